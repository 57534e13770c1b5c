"""The parameters of a GGUF model whose architecture transformers does not map, one by one from the model's own names.

The `gguf` package says which tensor a parameter is. A `Rule` says what is otherwise: a parameter of several tensors, or
of one that llama.cpp changed. It is written down with torch's own operations, so that it streams like any other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lamina.checkpoint import Checkpoint, TensorEntry
from lamina.checkpoint.gguf import CODEC_PREFIX, GgufFile
from lamina.codec.gguf_blocks import ExpertsAcross
from lamina.errors import CheckpointError, UnsupportedError
from lamina.hf.internals import silent
from lamina.tensors.disk import DiskTensor, recording, torch_dtype

LAYER = re.compile(r"\.layers\.(\d+)\.")
BLOCK = re.compile(r"blk\.(\d+)\.")
ELSEWHERE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # the config has them


@dataclass(frozen=True)
class Rule:
    """A parameter that is not the tensor of its name, as it is.

    Attributes:
        ending: of its name.
        sources: ends of the tensors' names, behind their block; none where it is the tensor of its name. Where a file
            lacks one of them, the rule does not apply.
        make: (config, tensors) -> the parameter.
        raw: whether `make` gets entries, whose bytes it reads itself.
    """

    ending: str
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    raw: bool = False


def as_it_is(config: PreTrainedConfig, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor under a name that the `gguf` package does not have."""
    return tensor


def gate_and_up(config: PreTrainedConfig, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Experts' two halves, (experts, rows, columns) each, one behind the other."""
    return torch.cat([gate, up], 1)


def in_turn(config: PreTrainedConfig, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Biases (experts, elements) of which every other element is the first's."""
    return torch.stack([first, second], -1).flatten(-2)


def keys_and_values(config: PreTrainedConfig, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Latent attention's projection: (heads, rank, size), transposed by llama.cpp, and (heads, size, rank)."""
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def minus_one(config: PreTrainedConfig, tensor: torch.Tensor) -> torch.Tensor:
    """A norm's weight, which llama.cpp stores one higher."""
    return tensor - 1


def log_of_minus(config: PreTrainedConfig, tensor: torch.Tensor) -> torch.Tensor:
    """What llama.cpp stores as minus its exponential."""
    return torch.log(-tensor)


def queries_to_gates(config: PreTrainedConfig, mixed: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Linear attention's projection, by key head: its rows of queries, keys, values and gates.

    Args:
        config: the model's.
        mixed: the rows of all queries, then of all keys, then of all values.
        gates: of all gates.
    """
    heads, size = config.linear_num_key_heads, config.linear_key_head_dim
    wide = gates.shape[0] // heads
    rows: list[torch.Tensor] = []
    for head in range(heads):
        rows += [mixed[first * size :][:size] for first in (head, heads + head)]
        rows += [mixed[2 * heads * size + head * wide :][:wide], gates[head * wide :][:wide]]
    return torch.cat(rows)


def across(config: PreTrainedConfig, *entries: TensorEntry) -> torch.Tensor:
    """Experts (experts, columns, rows), of several tensors in turn, as (experts, rows, columns)."""
    experts, columns, rows = entries[0].shape
    codecs = tuple(entry.encoding.codec if entry.encoding else CODEC_PREFIX + entry.dtype for entry in entries)
    shape = (experts, rows, columns * len(entries))
    packed = ExpertsAcross(shape, config.dtype or torch.float32, codecs)
    return DiskTensor.computed(packed, [entry.name for entry in entries], shape, packed.dtype)


def load_by_rules(
    file: GgufFile, config: PreTrainedConfig, rules: Sequence[Rule]
) -> tuple[dict[str, DiskTensor], Checkpoint]:
    """What transformers' loader gets, and the checkpoint with what that needs of it.

    Args:
        file: the model's.
        config: what is in its metadata.
        rules: what is not a tensor as it is.

    Raises:
        CheckpointError: a tensor of another shape than the model wants.
        UnsupportedError: a tensor that no parameter is.
        ImportError: the gguf package is missing.
    """
    with torch.device("meta"), silent():
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    reader = _Reader(file, config, rules)
    with recording():
        tensors = {name: made for name, meta in wanted.items() if (made := reader.make(name, meta.shape)) is not None}
    if (left := next(reader.left(), None)) is not None:
        raise UnsupportedError(f"{file.path} holds {left}, which is no part of the model here: use the safetensors")
    raw = {name: _bytes_of(file.checkpoint.tensors[name]) for name in reader.raw}
    return tensors, dataclasses.replace(file.checkpoint, tensors={**file.checkpoint.tensors, **raw})


class _Reader:
    """Makes the parameters of one file, and keeps what they were made of."""

    def __init__(self, file: GgufFile, config: PreTrainedConfig, rules: Sequence[Rule]) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self._entries, self._config, self._rules = file.checkpoint.tensors, config, rules
        self._path, self._layers = file.path, config.num_hidden_layers
        own = {name: number for number, name in MODEL_ARCH_NAMES.items()}[str(file.get("general.architecture"))]
        self._names: Any = get_tensor_name_map(own, self._layers)
        self._used: set[str] = set()
        self.raw: list[str] = []

    def make(self, name: str, shape: torch.Size) -> DiskTensor | None:
        """A parameter; None where the file has nothing for it."""
        rule = self._rule(name)
        sources = self._sources(name, rule)
        if not sources:
            return None
        self._used.update(source.name for source in sources)
        if rule is not None and rule.raw:
            self.raw += [source.name for source in sources]
            made = rule.make(self._config, *sources)
        else:
            stored = [DiskTensor.of(source.name, source.shape, torch_dtype(source)) for source in sources]
            made = stored[0] if rule is None else rule.make(self._config, *stored)
        made = made if made.shape == shape else self._shaped(made, name, shape, sources[0])
        assert isinstance(made, DiskTensor)
        return made

    def _rule(self, name: str) -> Rule | None:
        """The first rule for a parameter whose tensors are there."""
        return next((each for each in self._rules if name.endswith(each.ending) and self._sources(name, each)), None)

    def _shaped(self, made: torch.Tensor, name: str, shape: torch.Size, source: TensorEntry) -> torch.Tensor:
        """A parameter with dimensions of one element that llama.cpp leaves out."""
        if math.prod(made.shape) != math.prod(shape):
            raise CheckpointError(
                f"{source.name} in {self._path} has the shape {list(source.shape)}, which does not make "
                f"{name} of {list(shape)}: metadata and tensors are of different models"
            )
        return made.reshape(shape)

    def left(self) -> Iterator[str]:
        """Tensors that no parameter is made of, but those of blocks beyond the last layer and of rotations."""
        for name in self._entries.keys() - self._used - set(ELSEWHERE):
            block = BLOCK.match(name)
            if block is None or int(block[1]) < self._layers:
                yield name

    def _sources(self, name: str, rule: Rule | None) -> list[TensorEntry]:
        """The tensors of a parameter; none where the file lacks one of them."""
        layer = LAYER.search(name)
        prefix = f"blk.{layer[1]}." if layer else ""
        if rule is not None and rule.sources:
            names = [prefix + source for source in rule.sources]
        else:
            names = [next((each for each in self._own(name) if each in self._entries), name)]
        return [self._entries[each] for each in names] if all(each in self._entries for each in names) else []

    def _own(self, name: str) -> list[str]:
        """What the tensor of a parameter may be called."""
        base, _, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            base, ending = name, ""
        target = self._names.get_name(base)
        return [f"{target}.{ending}"] if ending else [f"{target}", f"{target}.weight"]


def _bytes_of(entry: TensorEntry) -> TensorEntry:
    """A tensor as the bytes of its rows."""
    return dataclasses.replace(
        entry,
        dtype="U8",
        shape=(*entry.shape[:-1], entry.extent.length // math.prod(entry.shape[:-1])),
        encoding=None,
    )
