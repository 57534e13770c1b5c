"""The keyword arguments of `PreTrainedModel.from_pretrained`: what each means for a model that streams.

Each is obeyed, or refused in one line that names what to use instead, or said to have no meaning here. Those that no
table here names are passed on to transformers, which takes them for the config or the model, or refuses them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers import GenerationConfig, PreTrainedConfig

from lamina.caller import option
from lamina.checkpoint import Checkpoint
from lamina.checkpoint.choose import is_pickled
from lamina.checkpoint.manifest import MANIFEST
from lamina.errors import RequestError, UnsupportedError
from lamina.hf.config import short
from lamina.hf.internals import attention_names
from lamina.hub import HUB_OPTIONS

P = ParamSpec("P")
T = TypeVar("T")
IGNORED = (  # how weights are read, which is Lamina's own affair; what transformers itself no longer looks at
    "max_seq_len", "offload_folder", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap",
    "mirror", "_fast_init", "from_tf", "from_flax",
)  # fmt: skip
PRIVATE = ("_commit_hash", "_from_auto", "_from_pipeline")  # what transformers tells itself
ANYWHERE = ("auto", "balanced", "balanced_low_0", "sequential")  # of `device_map`
_PACKED = "compression='8bit' or '4bit' packs the weights (a quantised checkpoint needs nothing)"
_ONE_PROCESS = "a model streams into one process and one device: use device= and memory="
HUB_KEYS = (*HUB_OPTIONS, "force_download", "proxies")
REFUSED: Mapping[str, str] = {
    "state_dict": "the weights come from the checkpoint: load the model, then model.load_state_dict(...)",
    "quantization_config": _PACKED,
    "load_in_8bit": "use compression='8bit'",
    "load_in_4bit": "use compression='4bit'",
    "max_memory": "use memory= for the process and device_memory= for the accelerator",
    "tp_plan": _ONE_PROCESS,
    "tp_size": _ONE_PROCESS,
    "device_mesh": _ONE_PROCESS,
    "distributed_config": _ONE_PROCESS,
    "ignore_mismatched_sizes": "weights that do not fit the config would be random: pass the config= that they fit",
    "force_download": "delete the model in the hub's cache (hf cache rm), it is then downloaded again",
    "proxies": "set the environment variable HTTPS_PROXY",
    "tqdm_class": "use progress=, which is called with the bytes",
    "use_auth_token": "use token=",
    "adapter_kwargs": "load the model, then model.load_adapter(...)",
    "adapter_name": "load the model, then model.load_adapter(..., adapter_name=...)",
    "use_kernels": "a model that streams computes with transformers' own code: leave it out",
    "kernel_config": "a model that streams computes with transformers' own code: leave it out",
    "allow_all_kernels": "a model that streams computes with transformers' own code: leave it out",
    "fusion_config": "a model that streams computes with transformers' own modules: leave it out",
}
"""What cannot be had, and what to use instead; None, False and what is empty ask for nothing."""
NONE_ASKS_NOTHING = (*HUB_KEYS, "variant", "gguf_file", "code_revision")
_PATH: Any = str | os.PathLike
KINDS: Mapping[str, tuple[Any, str]] = {
    "config": (PreTrainedConfig | _PATH, "a transformers config, or the path of one"),
    "generation_config": (GenerationConfig | _PATH, "a GenerationConfig, or its path"),
    "revision": (str, "a branch, a tag or a commit"),
    "subfolder": (str, "a folder's name"),
    "variant": (str, "a word, such as 'fp16'"),
    "gguf_file": (_PATH, "a file's name"),
    "cache_dir": (_PATH, "a folder"),
    "key_mapping": (Mapping, "a mapping of patterns to names"),
}


def sorted_out(
    options: Mapping[str, Any], device: str | torch.device
) -> tuple[dict[str, Any], str | torch.device, tuple[str, ...]]:
    """What is left for the checkpoint, the config and the model; the device; the names that have no meaning here.

    Args:
        options: of `from_pretrained`, beyond Lamina's own.
        device: as it was asked for.

    Raises:
        RequestError: an argument of a wrong kind, two that contradict each other, one that cannot be obeyed.
        UnsupportedError: one that a model that streams cannot have.
    """
    left = {
        name: _one_dtype(name, value) if name in ("dtype", "torch_dtype") else value
        for name, value in options.items()
        if name not in PRIVATE and not (value is None and name in NONE_ASKS_NOTHING)
    }
    _refuse(left)
    ignored = tuple(name for name in IGNORED if _asks(left.pop(name, None)))
    placed = left.pop("device_map", None)
    if placed is not None:
        device = _placed(placed, device)
    device = _in_context(device)
    for name, (kinds, wanted) in KINDS.items():
        value = left.get(name)
        if value is not None and not isinstance(value, kinds):
            raise RequestError(f"{name} must be {wanted}, got {type(value).__name__} {short(value)}")
    return left, device, ignored


def _refuse(options: dict[str, Any]) -> None:
    """Take what cannot be had out of the options; an error where it is asked for."""
    if options.get("adapter_name") == "default":
        options.pop("adapter_name")
    for name in REFUSED:
        if _asks(options.pop(name, None)):
            raise UnsupportedError(f"{name} cannot be used here: {REFUSED[name]}")


def ordinarily(function: Callable[P, T]) -> Callable[P, T]:
    """The function outside of `torch.inference_mode`, in which nothing can stand for a tensor that is on disk."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            return function(*args, **kwargs)

    return outside


def check_format(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Take `use_safetensors` and `weights_only` out of the options, and refuse what the checkpoint cannot obey.

    Raises:
        RequestError: weights of another format are asked for than there are.
    """
    safe, weights_only = options.pop("use_safetensors", None), options.pop("weights_only", True)
    if os.path.exists(os.path.join(checkpoint.root, MANIFEST)):
        return  # of a store: what is said of the model's own files
    names = [os.path.basename(file) for file in checkpoint.files]
    pickled = any(map(is_pickled, names))
    as_safetensors = [name.endswith(".safetensors") for name in names]
    if safe and not all(as_safetensors):
        raise RequestError(f"use_safetensors=True, but {checkpoint.root} has none: leave it out")
    if safe is False and not pickled and any(as_safetensors):
        raise RequestError(f"use_safetensors=False, but {checkpoint.root} is read from its safetensors: leave it out")
    if pickled and not weights_only:
        raise UnsupportedError("weights_only=False would run code of the pickle: leave it out, its tensors are read")


def check_computing(options: Mapping[str, Any]) -> None:
    """Refuse a dtype, or a way of computing attention, that there is not.

    Raises:
        RequestError: it says which, and what may be given.
    """
    for name in ("dtype", "torch_dtype"):
        _check_dtype(name, options.get(name))
    _check_attention(options.get("attn_implementation"))


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype is None or dtype == "auto":
        return
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype):
        raise RequestError(f"{option(name, dtype)} is no dtype of torch: give bfloat16, float16, float32 or auto")
    if not known.is_floating_point:
        raise RequestError(f"{option(name, dtype)} is not what a model computes in: give bfloat16, float16 or float32")


def _check_attention(name: Any) -> None:
    if not isinstance(name, str) or "/" in name:  # a kernel on the hub is named as a repository
        return
    known = attention_names()
    if name.removeprefix("paged|") not in known:
        shown = ", ".join(known)
        raise RequestError(f"{option('attn_implementation', name)} is not known to transformers, which has {shown}")


def _asks(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, Mapping) and not value)


def _one_dtype(name: str, value: Any) -> Any:
    """The dtype of a mapping of parts to dtypes that names the whole alone."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {""}:
        raise RequestError(f"{name} must be one dtype for the whole model, got {short(dict(value))}: give one of them")
    return value[""]


def _placed(placed: Any, device: str | torch.device) -> str | torch.device:
    """The one device that a `device_map` names."""
    named = set(map(str, placed.values())) if isinstance(placed, Mapping) else {str(placed)}
    if named <= set(ANYWHERE):
        return device
    if len(named) > 1 or "disk" in named or isinstance(placed, bool):
        raise RequestError(
            f"device_map {short(placed)} cannot be obeyed: what lives where follows from memory= and device_memory=; "
            "name one device, or leave it out"
        )
    (name,) = named
    try:
        wanted = torch.device(int(name) if name.lstrip("-").isdigit() else name)
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0][:100]
        raise RequestError(f"device_map {short(placed)} names no device that is here: {text}; try 'cpu'") from error
    if str(device) not in ("auto", str(wanted)):
        raise RequestError(f"device_map says {wanted}, device says {device}: give one of them")
    return wanted


def _in_context(device: str | torch.device) -> str | torch.device:
    """The device of the `torch.device` context or of `torch.set_default_device`, where no other is asked for."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    contexts = [mode.device for mode in modes if isinstance(mode, DeviceContext)]
    if not contexts:
        return device
    here = torch.device(contexts[-1])
    if here.type == "meta":
        raise RequestError(
            "a model cannot be loaded on torch's meta device: leave the torch.device('meta') context, "
            "or make an empty model with transformers' from_config"
        )
    return here if str(device) == "auto" else device
