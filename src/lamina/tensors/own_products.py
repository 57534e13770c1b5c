"""Products with plain weights by Lamina's own kernels, in place of torch's, while a model runs.

See `lamina.codec.rows`: the bits of a row depend on nothing else in the call, and the weight is gone through once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lamina.caller import option
from lamina.codec import native, rows
from lamina.errors import RequestError
from lamina.tensors.guard import Guarded

KERNELS = ("auto", "lamina", "torch")
_on: ContextVar[bool] = ContextVar("own_products", default=False)


def check_kernels(kernels: str | None) -> None:
    """Refuse a name that is none of `KERNELS`."""
    if kernels is not None and kernels not in KERNELS:
        raise RequestError(f"{option('kernels', kernels)} is none of {', '.join(KERNELS)}")


def chosen(kernels: str | None, device: torch.device, dtype: torch.dtype) -> tuple[bool, str | None]:
    """Whether products are made by Lamina's own kernels, and what is to be said where they were asked for in vain.

    Args:
        kernels: "lamina" or "torch"; "auto" takes Lamina's where this processor has instructions for the dtype, so that
            they are no slower. None is "torch".

    """
    if kernels is None or kernels == "torch":
        return False, None
    if device.type != "cpu":
        return False, f"the model computes on {device.type} with torch's kernels: Lamina's are the processor's"
    if not native.available():
        return False, f"products are made by torch's kernels: {native.missing()}"
    if kernels == "auto" and not rows.is_quick(dtype):
        return False, f"products are made by torch's kernels: this processor has no instructions for {dtype} products"
    return True, None


def own_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """A product by Lamina's kernels, within `own_products`; None where torch has to make it."""
    if not _on.get() or not isinstance(weight, torch.Tensor):
        return None
    kind = type(weight)
    if kind is Guarded:
        if torch.is_grad_enabled():
            return None
        weight = weight.as_subclass(torch.Tensor)
    elif kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return None
    return rows.linear(x, weight, bias)


class _OwnProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            out = own_linear(*args, **(kwargs or {}))
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))


@contextmanager
def own_products(wanted: bool) -> Iterator[None]:
    """Within this block products of up to `rows.MOST_ROWS` rows with plain weights are made by Lamina's kernels."""
    if not wanted:
        yield
        return
    before = _on.set(True)
    try:
        with _OwnProducts():
            yield
    finally:
        _on.reset(before)
