"""What is asked for is looked at before any work begins: every value that can be judged without the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lamina.caller import option
from lamina.checkpoint.manifest import check_compression
from lamina.errors import RequestError
from lamina.hf.internals import attention_names
from lamina.runtime.load import choose_device
from lamina.sizes import parse_memory

MOST_CONTEXT = 2**31 - 1  # tokens; positions are counted in 32 bits by some kernels


def check_options(
    options: Mapping[str, Any],
    *,
    memory: float | str | None = None,
    device_memory: float | str | None = None,
    device: str | torch.device = "auto",
    context: int | None = None,
    compression: str | None = None,
) -> None:
    """Refuse a value that no model could be loaded with.

    Args:
        options: transformers' own.

    Raises:
        RequestError: it says which, and what may be given.
    """
    for name, size in (("memory", memory), ("device_memory", device_memory)):
        if size is not None:
            parse_memory(size, what=name)
    choose_device(device)
    if compression is not None:
        check_compression(compression)
    if context is not None:
        check_context(context)
    for name in ("dtype", "torch_dtype"):
        _check_dtype(name, options.get(name))
    _check_attention(options.get("attn_implementation"))


def check_context(context: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(context, bool) or not hasattr(context, "__index__"):
        raise RequestError(f"{option('context')} must be a whole number of tokens, got {context!r}")
    if not 1 <= context <= MOST_CONTEXT:
        raise RequestError(f"{option('context')} must be 1 to {MOST_CONTEXT} tokens, got {context}")


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
