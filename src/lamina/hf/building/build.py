"""Build the model's own transformers class on tensors that are still on disk.

transformers' public `from_pretrained(state_dict=...)` does everything it always does: it renames, merges and
casts checkpoint tensors, keeps what must be fp32 in fp32, ties weights, rebuilds buffers that no checkpoint
holds. It does it on `DiskTensor`s, so that nothing is read, and every parameter ends up knowing its bytes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lamina.caller import option
from lamina.checkpoint import Checkpoint
from lamina.errors import CheckpointError, LaminaError, MissingTensorError, RequestError, UnsupportedError
from lamina.hf.arguments import HUB_KEYS
from lamina.hf.building.classes import model_class
from lamina.hf.building.quantized_readers import (
    QUANTIZATION_KEYS,
    check_unpacked,
    implied_quantization,
    take_quantization,
    unpacked_state,
)
from lamina.hf.config import Unstored, as_many_as, blaming, check_counts, check_generation, fields_of, read_json
from lamina.hf.internals import generation_config_in, silent
from lamina.sizes import format_size
from lamina.tensors.disk import TORCH_DTYPES, DiskTensor, recording, torch_dtype

if TYPE_CHECKING:
    from lamina.hf.building.gguf import GgufModel

COMPARED_BYTES = 4 << 20  # at once, of two weights that may be one
WRAPPERS = {  # what begins the names of tensors that were saved out of a wrapper
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
}


@dataclass(frozen=True)
class Request:
    """What was asked of `from_pretrained`, sorted by who needs it.

    Attributes:
        folder: where config and tokenizer are.
        options: for transformers' config and model.
        trust_remote_code: run code that the checkpoint brings; never assumed.
        gguf: a file that has config and tokenizer in itself.
    """

    folder: str
    options: Mapping[str, Any]
    trust_remote_code: bool = False
    gguf: GgufModel | None = None


def config_place(request: Request) -> str:
    """How an error names the config of a request."""
    given = request.options.get("config")
    if isinstance(given, PreTrainedConfig):
        return "the config that was given"
    if request.gguf is not None:
        return request.folder
    return str(given) if given is not None else os.path.join(request.folder, "config.json")


_one_at_a_time = threading.RLock()  # transformers' loader sets the default dtype of all threads, and its own switches


def load_config(request: Request, tensors: int) -> tuple[PreTrainedConfig, dict[str, Any], str, Mapping[str, Any]]:
    """The model's config, the options that were not for it, where it comes from, and its fields as they are there.

    Args:
        tensors: in the checkpoint, which bound what the config counts.

    Raises:
        CheckpointError: no config, or one that transformers cannot read.
        UnsupportedError: a model type that cannot be streamed.
        RequestError: the config that was given cannot be used.
    """
    options = dict(request.options)
    given = options.pop("config", None)
    options.pop("generation_config", None)
    if request.gguf is not None:
        if given is not None:
            raise RequestError(f"config= cannot be used with {request.folder}: a GGUF file has its config in itself")
        return request.gguf.config, dict(request.gguf.options), request.folder, fields_of(request.gguf.config)
    check_counts(options, tensors, "from_pretrained", RequestError)
    if isinstance(given, PreTrainedConfig):
        own = {key: value for key, value in options.items() if key not in (*HUB_KEYS, "code_revision")}
        check_counts(given.to_dict(), tensors, "the config that was given", RequestError)
        return copy.deepcopy(given), own, "the config that was given", fields_of(given)
    return _read_config(given, options, request, tensors)


def _read_config(
    given: str | os.PathLike[str] | None, options: dict[str, Any], request: Request, tensors: int
) -> tuple[PreTrainedConfig, dict[str, Any], str, Mapping[str, Any]]:
    """`load_config` from a file: that of the checkpoint, or what was given."""
    source = request.folder if given is None else os.path.expanduser(os.fspath(given))
    file = _config_file(source, given, options)
    fields: Mapping[str, Any] = read_json(file) if os.path.isfile(file) else {}
    check_counts(fields, tensors, file)
    try:
        with blaming(file if fields else source, fields, "reading the config"):
            config, unused = AutoConfig.from_pretrained(
                source,
                return_unused_kwargs=True,
                trust_remote_code=request.trust_remote_code,
                **{key: value for key, value in options.items() if value != "auto" or "dtype" not in key},
            )
            fields = fields or fields_of(config)
    except CheckpointError as error:
        _explain_refused(error, source, given=not fields)
        raise
    return config, unused, file, fields


def _config_file(source: str, given: Any, options: dict[str, Any]) -> str:
    """Where in `source` the config is: nowhere yet, where that is a repository that was given."""
    if given is not None and os.path.exists(source):
        options.pop("subfolder", None)
    if os.path.isfile(source):
        return source
    file = os.path.join(source, options.get("subfolder") or "", "config.json")
    if given is None and not os.path.isfile(file):
        raise CheckpointError(f"no config.json in {os.path.dirname(file)}: fetch it, it belongs beside the weights")
    return file


def _explain_refused(error: CheckpointError, source: str, *, given: bool) -> None:
    """Raise what says better why transformers read no config there, if anything does.

    Args:
        given: it was asked for with `config=`, and is no file.
    """
    text = " ".join(str(error.__cause__).split())
    if "trust_remote_code" in text:
        raise RequestError(
            f"the model in {source} brings its own code: read it, then pass {option('trust_remote_code', True)}"
        ) from error.__cause__
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        known = f"transformers does not know the model in {source}: {text[:200]}"
        raise UnsupportedError(known) from error.__cause__
    if given:
        raise RequestError(f"config= is neither a config nor the path of one: {source}: {text[:200]}") from error


def build(request: Request, checkpoint: Checkpoint, loading_info: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model, each parameter a `DiskTensor` that knows where its bytes are.

    Args:
        loading_info: takes what transformers' loader says of names and shapes.

    Raises:
        MissingTensorError: the model wants a tensor that the checkpoint lacks or holds in another shape.
        CheckpointError, UnsupportedError: the config cannot be used.
        RequestError: an option that transformers does not know, or one that does not fit the model.
    """
    try:
        return _build(request, checkpoint, loading_info)
    except CheckpointError as error:
        mine = [name for name in request.options if name not in HUB_KEYS]
        if mine and _builds(request, checkpoint):
            raise RequestError(
                f"what was given to from_pretrained does not fit the model in {request.folder} "
                f"({', '.join(mine)}): {error}"
            ) from error
        raise


def _builds(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether the model can be made without the user's own options."""
    own = {name: value for name, value in request.options.items() if name in HUB_KEYS}
    try:
        _build(replace(request, options=own), checkpoint, None)
    except LaminaError:
        return False
    return True


def _build(request: Request, checkpoint: Checkpoint, loading_info: dict[str, Any] | None) -> PreTrainedModel:
    tensors = len(checkpoint.tensors)
    config, options, where, fields = load_config(request, tensors)
    with blaming(where, fields, "reading how it is quantised"):
        said = take_quantization(config) if _says_quantized(config) else None
    quantization = said or implied_quantization(checkpoint)
    with as_many_as(tensors, where), blaming(where, fields, "making the model"):
        kind = model_class(config, request.trust_remote_code, request.options.get("code_revision"))
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(kind, "config_class", None) is text:
        config = config.get_text_config()  # a text model out of a multimodal checkpoint, as AutoModelForCausalLM does
    for name in ("_from_auto", "torch_dtype", "code_revision"):
        options.pop(name, None)
    # the config took it in, but a text model's config is a part of it that does not know
    options["dtype"] = _dtype(request, checkpoint, config)
    state = _state(request, checkpoint, options["dtype"], quantization)
    options["ignore_mismatched_sizes"] = True  # transformers then names them; `_check` refuses
    generation = _generation_config(request, kind)
    unstored = Unstored(checkpoint.nbytes, where)
    recorded = recording(functools.partial(_same_bytes, checkpoint))
    with _one_at_a_time, recorded, silent(), as_many_as(tensors, where), unstored:
        try:
            with blaming(where, fields, "building the model"):
                model, info = kind.from_pretrained(
                    None, config=config, state_dict=state, output_loading_info=True, generation_config=generation,
                    **options
                )  # fmt: skip
        except CheckpointError as error:
            _explain_option(error, kind.__name__)
            raise
    _check(info, checkpoint, state)
    _check_made(model, where, kind.__name__, unstored.left_out, checkpoint.root)
    if loading_info is not None:
        loading_info.update(info)
    if quantization is not None:
        check_unpacked(model, checkpoint.root)
    model.config.name_or_path = model.name_or_path = request.folder
    if "experts_implementation" not in request.options and any(model.get_experts_implementation().values()):
        model.set_experts_implementation("eager")  # the one that takes an expert at a time
    return model


def _says_quantized(config: PreTrainedConfig) -> bool:
    parts = (config, config.get_text_config())
    return any(key in part.__dict__ for part in parts for key in QUANTIZATION_KEYS)


def _explain_option(error: CheckpointError, kind: str) -> None:
    """Raise a RequestError if the model could not be made because an option is unknown."""
    text = " ".join(str(error.__cause__).split())
    if "unexpected keyword argument" in text:
        raise RequestError(f"neither Lamina nor {kind} knows this option: {text}") from error


def _check_made(model: PreTrainedModel, where: str, kind: str, left_out: int, root: str) -> None:
    """Refuse what the config asks for and the checkpoint in `root` has not: an encoder, or `left_out` bytes."""
    encoder = any("encoder" in name.rpartition(".")[2] for name, _ in model.named_modules())
    if getattr(model.config, "is_encoder_decoder", False) and not encoder:
        said = f"is_encoder_decoder = {str(model.config.is_encoder_decoder)[:60]}"
        raise CheckpointError(f"{where}: {said}, but {kind} has no encoder: fetch the file again")
    if left_out:
        raise CheckpointError(f"{where} asks for {format_size(left_out)} of weights that no file of {root} holds")


def _dtype(request: Request, checkpoint: Checkpoint, config: PreTrainedConfig) -> Any:
    """What was asked for; else the config's; else that of the tensor by which transformers would judge the files."""
    asked = request.options.get("dtype") or request.options.get("torch_dtype") or "auto"
    if asked != "auto" or request.gguf is not None:
        return asked
    if (own := getattr(config, "dtype", None)) is not None:
        return own
    return TORCH_DTYPES.get(checkpoint.dtype or "", asked)


def _state(
    request: Request, checkpoint: Checkpoint, dtype: Any, quantization: Mapping[str, Any] | None
) -> dict[str, DiskTensor]:
    """What transformers' loader gets for the checkpoint's tensors."""
    if request.gguf is not None:
        return dict(request.gguf.tensors)
    state = {
        entry.name: DiskTensor.of(entry.name, entry.shape, torch_dtype(entry)) for entry in checkpoint.tensors.values()
    }
    if quantization is None:
        return state
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return unpacked_state(state, checkpoint, quantization, dtype if isinstance(dtype, torch.dtype) else None)


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are the same numbers: pickles have both names of tied weights, always."""
    entries = [checkpoint.tensors[name] for name in (one, other)]
    if len({(entry.dtype, entry.shape, entry.encoding) for entry in entries}) > 1:
        return False
    extents = [entry.extent for entry in entries]
    if extents[0] == extents[1]:
        return True
    if extents[0].length != extents[1].length or any("://" in extent.file for extent in extents):
        return False
    with open(extents[0].file, "rb") as first, open(extents[1].file, "rb") as second:
        for at in range(0, extents[0].length, COMPARED_BYTES):
            count = min(COMPARED_BYTES, extents[0].length - at)
            parts = [os.pread(f.fileno(), count, e.offset + at) for f, e in zip((first, second), extents, strict=True)]
            if parts[0] != parts[1]:
                return False
    return True


def _generation_config(request: Request, model: type[PreTrainedModel]) -> GenerationConfig | None:
    given = request.options.get("generation_config")
    if isinstance(given, GenerationConfig):
        return given
    if request.gguf is not None and given is None:
        return request.gguf.generation_config()
    hub = {key: request.options[key] for key in HUB_KEYS if key in request.options}
    source = request.folder if given is None else os.path.expanduser(os.fspath(given))
    kind: type[GenerationConfig] = model.generation_config_class
    try:
        return _read_generation(source, given, hub, kind)
    except CheckpointError as error:
        if given is not None:
            raise RequestError(f"generation_config= is no generation config, nor the path of one: {error}") from error
        if not isinstance(error.__cause__, OSError):
            raise
    return _in_config(request.folder, hub) if kind is GenerationConfig else None


def _in_config(folder: str, hub: Mapping[str, Any]) -> GenerationConfig | None:
    """What a `config.json` says of generation, as those of older models do."""
    file = os.path.join(folder, hub.get("subfolder") or "", "config.json")
    if not os.path.isfile(file):
        return None
    fields = read_json(file)
    check_generation(fields, file)
    with blaming(file, fields, "reading how to generate"), silent():
        return generation_config_in(folder, **hub)


def _read_generation(source: str, given: Any, hub: dict[str, Any], kind: type[GenerationConfig]) -> GenerationConfig:
    """The generation config in a file, a folder or a repository; `hub` says where in it."""
    if given is not None and os.path.exists(source):
        hub.pop("subfolder", None)
    folder, name = os.path.split(source) if os.path.isfile(source) else (source, "generation_config.json")
    file = os.path.join(folder, hub.get("subfolder") or "", name)
    fields: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # transformers does without one that is no JSON object
        fields = read_json(file) if os.path.isfile(file) else {}
    check_generation(fields, file)
    with blaming(file, fields, "reading it"), silent():
        return kind.from_pretrained(folder, name, **hub)


def _check(info: Mapping[str, Any], checkpoint: Checkpoint, names: Iterable[str]) -> None:
    where = checkpoint.root
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, got, wanted = mismatched[0]
        raise MissingTensorError(
            f"tensor {name!r} in {where} has shape {tuple(got)}, the config wants {tuple(wanted)}: "
            f"config and weights are of different models"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = _renamed(missing, names) or "the checkpoint is incomplete or of another model"
        if promised := next((name for name in missing if name in checkpoint.absent), None):
            file = checkpoint.absent[promised]
            why = f"the index promises {promised!r} in {file}, which is damaged or of another model: fetch both again"
        raise MissingTensorError(f"the model wants tensor {missing[0]!r}{more}, which no file of {where} holds: {why}")


def _renamed(missing: Sequence[str], names: Iterable[str]) -> str | None:
    """What to do where what is missing is there, under names with a common beginning more, or less."""
    held, wanted = set(names), set(missing)
    prefix, _ = _commonest_beginning(held, wanted)
    if prefix and all(name.startswith(prefix) for name in held):
        why = next((f", which {by} adds" for start, by in WRAPPERS.items() if prefix.startswith(start)), "")
        mapping = {f"^{re.escape(prefix)}": ""}
        renaming = f"from_pretrained(..., key_mapping={mapping!r}) takes it off"
        return f"all names there begin with {prefix!r}{why}: {renaming}"
    prefix, count = _commonest_beginning(missing, held)
    if 2 * count > len(missing):
        return f"the names there lack the beginning {prefix!r}: from_pretrained(..., key_mapping=...) renames them"
    return None


def _commonest_beginning(names: Iterable[str], ends: Container[str]) -> tuple[str, int]:
    """What stands before one of these ends in the most names, and in how many; "" and 0 where nothing does."""
    found = Counter(name[: -len(end)] for name in names for end in _ends(name) if end in ends)
    return next(iter(found.most_common(1)), ("", 0))


def _ends(name: str) -> list[str]:
    """`b.c` and `c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
