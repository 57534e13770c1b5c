"""GGUF models: the config, the tokenizer, and where in the file each parameter of the model is.

transformers has its own reading of GGUF, which is asked for everything that it knows: which config key a
metadata key is, which parameter a tensor is, and what llama.cpp did to the values. Only the weights are not
unpacked. To see what becomes of a tensor, transformers' own `TensorProcessor` is given numbers of rows in place of
values: rows in another order come out as a row order, the experts' two halves as a concatenation, and whatever
else, such as norms that llama.cpp stores one higher, is an expression that runs the processor on the real values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lamina.checkpoint import DTYPE_BYTES, Checkpoint, TensorEntry
from lamina.checkpoint.extent import Encoding
from lamina.checkpoint.gguf import CODEC_PREFIX, GgufFile, open_gguf
from lamina.codec.gguf_blocks import register_all
from lamina.errors import MissingTensorError, UnsupportedError
from lamina.hf import internals
from lamina.hf.building.gguf_config import CAUSES, load_gguf_config, refused
from lamina.hf.building.gguf_rules import load_by_rules
from lamina.hf.building.gguf_table import row_of
from lamina.hf.internals import TOKENIZER_MAPPING_NAMES, rename_source_key, silent, tokenizer_class_from_name
from lamina.hf.tokenizer import usable
from lamina.tensors.disk import DiskTensor, recording, torch_dtype
from lamina.tensors.expressions import Leaf, Op

PROBED_COLUMNS = 2  # in place of all of a row: enough to tell columns in another order from rows in another order
INSTALL = "GGUF files need the gguf package: pip install 'lamina[gguf]'"
END_OF_TURN = ("eos", "eot", "eom")  # llama.cpp stops at each of them

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file as a transformers model sees it.

    Attributes:
        path: the file, or the first part of a split one.
        checkpoint: its tensors by their GGUF names, with the row orders that the config asks for.
        config: the model's.
        options: those of the request that were not for the config.
        tensors: what transformers' loader gets, by its names; the sources are names in `checkpoint`.
        stops: ids of the tokens that end an answer.
    """

    path: str
    checkpoint: Checkpoint
    config: PreTrainedConfig
    options: Mapping[str, Any]
    tensors: Mapping[str, DiskTensor]
    stops: tuple[int, ...]

    @property
    def header_bytes(self) -> int:
        """What comes before the tensors of the first file."""
        extents = [entry.extent for entry in self.checkpoint.tensors.values() if entry.extent.file == self.path]
        return min((extent.offset for extent in extents), default=0)

    def generation_config(self) -> GenerationConfig:
        """As transformers makes it of the config, which however knows one end of an answer only."""
        generation = GenerationConfig.from_model_config(self.config)
        if self.stops:
            generation.eos_token_id = list(self.stops) if len(self.stops) > 1 else self.stops[0]
        return generation

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer and the chat template of the file.

        Raises:
            RequestError: there is none, or transformers cannot make one of it.
        """
        folder, name = os.path.split(self.path)

        def load() -> PreTrainedTokenizerBase:
            with silent():
                # AutoTokenizer would read the vocabulary with the gguf package, only to learn the model type.
                known = tokenizer_class_from_name(TOKENIZER_MAPPING_NAMES.get(self.config.model_type) or "")
                loader = known or PreTrainedTokenizerFast
                tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder, gguf_file=name)
                return tokenizer

        return usable(load, self.path)


def load_gguf(path: str | os.PathLike[str], options: Mapping[str, Any]) -> GgufModel:
    """Everything of a GGUF file but the weights.

    Args:
        path: the file; any part of a split one.
        options: for transformers' config and model. Without a `dtype` the file's own is taken: bfloat16 for
            quantised weights, because that is what they are computed with the quickest.

    Raises:
        UnsupportedError: transformers does not know the architecture, or the gguf package is missing.
        CheckpointError: see `lamina.checkpoint.gguf.open_gguf`; or the metadata lacks what a config needs.
    """
    file = open_gguf(path)
    register_all()
    try:
        config, unused = load_gguf_config(file, options)
        tensors, checkpoint = _load_tensors(file, config)
    except ImportError as error:
        raise UnsupportedError(INSTALL) from error
    stops = [file.get(f"tokenizer.ggml.{name}_token_id") for name in END_OF_TURN]
    found = tuple(dict.fromkeys(stop for stop in stops if isinstance(stop, int)))
    return GgufModel(file.path, checkpoint, config, unused, tensors, found)


@dataclass(frozen=True)
class _Names:
    """As much of a model as transformers asks for to name its parameters."""

    config: PreTrainedConfig
    parameters: Mapping[str, None]
    inner: tuple[tuple[str, _Names], ...] = ()

    def state_dict(self) -> Mapping[str, None]:
        return self.parameters

    def named_children(self) -> tuple[tuple[str, _Names], ...]:
        return self.inner


@dataclass(frozen=True)
class _Processor:
    """transformers' processor of an architecture, and which parameter each GGUF tensor is."""

    processor: Any
    names: Mapping[str, str]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What becomes of GGUF tensors; by the names of parameters."""
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        found: dict[str, Array] = {}
        with np.errstate(all="ignore"):
            for name, weights in values.items():
                result = self.processor.process(
                    weights=weights, name=name, tensor_key_mapping=self.names, parsed_parameters=parsed
                )
                if result.name in self.names:
                    found[self.names[result.name]] = result.weights
        return found | {name: tensor.numpy() for name, tensor in parsed["tensors"].items()}

    def target(self, name: str) -> str | None:
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"))


@dataclass(frozen=True)
class _Computed:
    """The function of an expression: one parameter from its GGUF tensors' real values."""

    processor: _Processor | _Conversions
    sources: tuple[str, ...]
    name: str

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        values = {source: tensor.float().cpu().numpy() for source, tensor in zip(self.sources, tensors, strict=True)}
        return torch.from_numpy(np.ascontiguousarray(self.processor.run(values)[self.name])).to(tensors[0].device)


def _load_tensors(file: GgufFile, config: PreTrainedConfig) -> tuple[dict[str, DiskTensor], Checkpoint]:
    """What transformers' loader gets, and the checkpoint with what that needs of it."""
    if (row := row_of(file)) is not None and row.rules is not None:
        return load_by_rules(file, config, row.rules)
    processor = _processor(file, config)
    targets: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in file.checkpoint.tensors.values():
        targets[processor.target(entry.name) or f"? {entry.name}"].append(entry)
    tensors: dict[str, DiskTensor] = {}
    orders: dict[str, tuple[int, ...]] = {}
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # the layers' orders are equal
    with recording():
        for entries in targets.values():
            for name, rows in _probed(processor, entries).items():
                tensors[name], order = _parameter(name, rows, entries, processor)
                if order is not None:
                    orders[entries[0].name] = shared.setdefault(order, order)
    entries_by_name = dict(file.checkpoint.tensors) | {name: _by_rows(file.checkpoint.tensors[name]) for name in orders}
    return tensors, dataclasses.replace(file.checkpoint, tensors=entries_by_name, row_orders=orders)


def _probes(entries: Sequence[TensorEntry]) -> dict[str, Array]:
    """For each tensor the numbers of its elements, of the first columns of each row only; no number twice."""
    probes: dict[str, Array] = {}
    at = 0
    for entry in entries:
        shape = entry.shape
        if len(shape) > 1:
            shape = (*shape[:-1], min(shape[-1], PROBED_COLUMNS))
        count = math.prod(shape)
        probes[entry.name] = np.arange(at, at + count).reshape(shape)
        at += count
    return probes


def _probed(processor: _Processor | _Conversions, entries: Sequence[TensorEntry]) -> dict[str, Array | None]:
    """The parameters that tensors become, with the numbers of the elements that they then hold."""
    try:
        return dict(processor.run(_probes(entries)))
    except (ValueError, IndexError):  # reshapes to a number of columns that it knows itself
        target = processor.target(entries[0].name)
        return {target: None} if target else {}


def _parameter(
    name: str, found: Array | None, entries: Sequence[TensorEntry], processor: _Processor | _Conversions
) -> tuple[DiskTensor, tuple[int, ...] | None]:
    """One parameter, and the order of its rows in the file where it is another one."""
    probes = list(_probes(entries).values())
    if found is not None and found.size != sum(probe.size for probe in probes):
        raise MissingTensorError(f"the model wants {name!r}, of which the file has only {entries[0].name!r}")
    if len(entries) > 1:
        return _joined(name, found, probes, entries), None
    entry, probe = entries[0], probes[0]
    if found is not None and found.dtype == probe.dtype:
        if (same := _reshaped(found, probe, entry)) is not None:
            return same, None
        if (order := _row_order(found, probe)) is not None:
            return _stored(entry), order
    shape = entry.shape
    if found is not None:
        shape = found.shape if probe.ndim == 1 else (*found.shape[:-1], entry.shape[-1])
    computed = Op(_Computed(processor, (entry.name,), name), (Leaf(entry.name),), {}, None)
    return DiskTensor(torch.empty(shape, dtype=torch.float32, device="meta"), computed, None), None


def _row_order(found: Array, probe: Array) -> tuple[int, ...] | None:
    """The order in which a matrix has the rows of a tensor, where it is these rows and nothing else."""
    if probe.ndim != 2 or found.shape != probe.shape:
        return None
    order = found[:, 0] // probe.shape[1]
    whole = np.array_equal(np.sort(order), np.arange(len(order)))
    return tuple(order.tolist()) if whole and np.array_equal(found, probe[order]) else None


def _joined(name: str, found: Array | None, probes: Sequence[Array], entries: Sequence[TensorEntry]) -> DiskTensor:
    """A parameter of several tensors one behind the other, along whichever dimension."""
    for dim in range(probes[0].ndim):
        for order in itertools.permutations(range(len(entries))):
            if found is not None and np.array_equal(found, np.concatenate([probes[i] for i in order], dim)):
                return _recorded(torch.cat([_stored(entries[i]) for i in order], dim))
    raise UnsupportedError(f"{name!r} is made of {len(entries)} tensors in a way that cannot be streamed")


def _reshaped(found: Array, probe: Array, entry: TensorEntry) -> DiskTensor | None:
    """A parameter that is a whole tensor as it is, transposed, or with dimensions of one element more."""
    if np.array_equal(found.ravel(), probe.ravel()):
        columns = found.shape[-1:] if probe.ndim == 1 else entry.shape[-1:]
        return _recorded(_stored(entry).reshape(*found.shape[:-1], *columns))
    return _recorded(_stored(entry).t()) if probe.ndim == 2 and np.array_equal(found, probe.T) else None


def _stored(entry: TensorEntry) -> DiskTensor:
    return DiskTensor.of(entry.name, entry.shape, torch_dtype(entry))


def _recorded(tensor: torch.Tensor) -> DiskTensor:
    assert isinstance(tensor, DiskTensor)
    return tensor


def _by_rows(entry: TensorEntry) -> TensorEntry:
    """A tensor of plain elements as panels of one row, so that its rows may have an order."""
    if entry.encoding is not None:
        return entry
    codec = Encoding(CODEC_PREFIX + entry.dtype, 1, entry.shape[-1] * DTYPE_BYTES[entry.dtype])
    return dataclasses.replace(entry, encoding=codec)


class _Mixtral:
    """Both of what llama.cpp does to Mixtral, which is a llama to it: transformers has one and the other."""

    def __init__(self, llama: Any, experts: Any) -> None:
        self.llama, self.experts = llama, experts
        self.preprocess_name = experts.preprocess_name
        self.perform_fallback_tensor_mapping = experts.perform_fallback_tensor_mapping

    def process(self, weights: Array, name: str, **more: Any) -> Any:
        return self.experts.process(self.llama.process(weights, name).weights, name, **more)


@dataclass(frozen=True)
class _Conversions:
    """transformers' newer way, for architectures that it has ported: conversions like those of safetensors files."""

    renamings: Sequence[Any]
    converters: Sequence[Any]

    def target(self, name: str) -> str:
        return self._renamed(name)[0]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What becomes of GGUF tensors; by the names of parameters."""
        found: dict[str, Array] = {}
        taken: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, weights in values.items():
            target, pattern = self._renamed(name)
            if pattern is None:
                found[target] = weights
            else:
                taken[target][pattern] = [torch.from_numpy(weights)]
        for target, tensors in taken.items():
            converter = next(each for each in self.converters if set(tensors) <= set(each.source_patterns))
            sides = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
            for operation in converter.operations:
                tensors = operation.convert(tensors, full_layer_name=target, **sides)
            found[target] = next(iter(tensors.values())).numpy()
        return found

    def _renamed(self, name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(name, self.renamings, self.converters)
        return renamed


def _processor(file: GgufFile, config: PreTrainedConfig) -> _Processor | _Conversions:
    architecture = file.get("general.architecture")
    if (mapping := internals.gguf_mapping(architecture, config)) is not None:
        return _Conversions(*mapping)
    text, family = config.get_text_config(), None
    row = row_of(file)
    processor = internals.gguf_processor(row.processor if row is not None else architecture)(config=text.to_dict())
    if row is not None:
        family = str(architecture)
    if text.model_type == "mixtral":
        processor, family = _Mixtral(processor, internals.gguf_processor("qwen3moe")()), "llama"
    try:
        with torch.device("meta"), silent():
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedError(f"{config.model_type} is not a causal language model: {str(error)[:160]}") from error
    prefix = model.base_model_prefix
    inner = getattr(model, prefix, None)
    parts = ((prefix, _Names(text, dict.fromkeys(inner.state_dict()))),) if inner is not None else ()
    try:
        names = internals.gguf_names(_Names(text, dict.fromkeys(model.state_dict()), parts), processor, family)
    except CAUSES as error:
        raise refused(file, error) from error
    return _Processor(processor, names)
