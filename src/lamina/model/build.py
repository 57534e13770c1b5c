"""Build the model's own transformers class on tensors that are still on disk.

transformers' public `from_pretrained(state_dict=...)` does everything it always does: it renames, merges and
casts checkpoint tensors, keeps what must be fp32 in fp32, ties weights, rebuilds buffers that no checkpoint
holds. It does it on `DiskTensor`s, so that nothing is read, and every parameter ends up knowing its bytes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lamina.caller import option
from lamina.checkpoint import Checkpoint, TensorEntry
from lamina.errors import CheckpointError, MissingTensorError, RequestError, UnsupportedError
from lamina.model.disk_tensor import DiskTensor, recording
from lamina.model.quantized import check_decoded, take_quantization, unpacked_state

if TYPE_CHECKING:
    from lamina.model.gguf import GgufModel

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
COMPARED_BYTES = 4 << 20  # at once, of two weights that may be one
HUB_KEYS = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download", "proxies")


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


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """torch's dtype for a checkpoint tensor.

    Raises:
        UnsupportedError: torch has none.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise UnsupportedError(
            f"tensor {entry.name!r} in {entry.extent.file} has dtype {entry.dtype}, "
            f"which torch {torch.__version__} lacks"
        )
    return TORCH_DTYPES[entry.dtype]


def load_config(request: Request) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The model's config, and the options that were not for it.

    Raises:
        CheckpointError: no config, or one that transformers cannot read.
        UnsupportedError: a model type that cannot be streamed.
    """
    if request.gguf is not None:
        return request.gguf.config, dict(request.gguf.options)
    try:
        config, unused = AutoConfig.from_pretrained(
            request.folder,
            return_unused_kwargs=True,
            trust_remote_code=request.trust_remote_code,
            **{key: value for key, value in request.options.items() if value != "auto" or "dtype" not in key},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        folder = os.path.join(request.folder, request.options.get("subfolder") or "")
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise CheckpointError(f"no config.json in {folder}: fetch it, it belongs beside the weights") from error
        if "trust_remote_code" in text:
            raise RequestError(
                f"the model in {request.folder} brings its own code: read it, then pass "
                f"{option('trust_remote_code', True)}"
            ) from error
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            raise UnsupportedError(f"transformers does not know the model in {request.folder}: {text[:200]}") from error
        raise CheckpointError(f"cannot read the config of the model in {request.folder}: {text[:300]}") from error
    return config, unused


def build(request: Request, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model, each parameter a `DiskTensor` that knows where its bytes are.

    Raises:
        MissingTensorError: the model wants a tensor that the checkpoint lacks or holds in another shape.
        CheckpointError, UnsupportedError: the config cannot be used.
        RequestError: an option that transformers does not know.
    """
    config, options = load_config(request)
    quantization = take_quantization(config)
    model_class = _class_of(config, request.trust_remote_code)
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(model_class, "config_class", None) is text:
        config = config.get_text_config()  # a text model out of a multimodal checkpoint, as AutoModelForCausalLM does
    state = _state(request, checkpoint, config, quantization)
    options.pop("_from_auto", None)
    options.pop("torch_dtype", None)
    # the config took it in, but a text model's config is a part of it that does not know
    options["dtype"] = request.options.get("dtype") or request.options.get("torch_dtype") or "auto"
    options["ignore_mismatched_sizes"] = True  # transformers then names them; `_check` refuses
    generation = _generation_config(request)
    with recording(functools.partial(_same_bytes, checkpoint)), silent():
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, generation_config=generation, **options
            )
        except (RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            if "unexpected keyword argument" in text:
                raise RequestError(f"neither Lamina nor {model_class.__name__} knows this option: {text}") from error
            raise CheckpointError(f"transformers cannot build {request.folder}: {text[:300]}") from error
    _check(info, checkpoint)
    if quantization is not None:
        check_decoded(model, checkpoint.root)
    model.config.name_or_path = model.name_or_path = request.folder
    if "experts_implementation" not in request.options and any(model.get_experts_implementation().values()):
        model.set_experts_implementation("eager")  # the one that takes an expert at a time
    return model


def _state(
    request: Request, checkpoint: Checkpoint, config: PreTrainedConfig, quantization: Mapping[str, Any] | None
) -> dict[str, DiskTensor]:
    """What transformers' loader gets for the checkpoint's tensors."""
    if request.gguf is not None:
        return dict(request.gguf.tensors)
    state = {
        entry.name: DiskTensor.of(entry.name, entry.shape, torch_dtype(entry)) for entry in checkpoint.tensors.values()
    }
    if quantization is None:
        return state
    wanted = request.options.get("dtype") or request.options.get("torch_dtype") or "auto"
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
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


def _class_of(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    try:
        with torch.device("meta"), silent():
            return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except ImportError as error:
        text = " ".join(str(error).split())
        raise UnsupportedError(f"{config.model_type} needs a package that is not installed: {text[:300]}") from error
    except ValueError as error:
        text = " ".join(str(error).split())
        raise UnsupportedError(f"{config.model_type} is not a causal language model: {text[:160]}") from error


def _generation_config(request: Request) -> GenerationConfig | None:
    if request.gguf is not None:
        return request.gguf.generation_config()
    hub = {key: request.options[key] for key in HUB_KEYS if key in request.options}
    try:
        return GenerationConfig.from_pretrained(request.folder, **hub)
    except OSError:
        return None


def _check(info: Mapping[str, Any], checkpoint: Checkpoint) -> None:
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
        raise MissingTensorError(
            f"the model wants tensor {missing[0]!r}{more}, which no file of {where} holds: "
            f"the checkpoint is incomplete or of another model"
        )


@contextmanager
def silent() -> Iterator[None]:
    """transformers without progress bars and load reports: the library prints nothing."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
