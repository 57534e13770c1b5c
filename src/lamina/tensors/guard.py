"""No gradient through a weight that is gone before a backward pass could use it.

Autograd keeps the tensors of a forward pass for the backward pass. A streamed weight's memory holds other weights by
then, so a gradient computed with it is wrong, without any error. Two guards, on the results and on the tensors
themselves, make every such backward pass one error: however the forward pass was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from lamina.errors import UnsupportedError

WHY = (
    "a gradient was asked for that needs weights which stream: they are gone when the backward pass comes; give enough "
    "memory for all weights to stay (lamina plan says how much), or compute under torch.no_grad()"
)
PACKED = (
    "a gradient was asked for that needs packed weights, which are unpacked for a moment only: load a checkpoint that "
    "is not packed (no GGUF file, no quantised one, no store in a codec) with memory for all of it, or compute under "
    "torch.no_grad()"
)
_PLAIN_GETTERS = frozenset(
    "shape dtype device requires_grad is_leaf grad ndim layout itemsize nbytes names is_sparse is_quantized is_meta "
    "is_nested is_cpu is_cuda is_mps is_xpu grad_fn output_nr _version _base _backward_hooks".split()
)


class _Refused(torch.autograd.Function):
    """Its result looks like one that depends on `sources`; asking for a gradient of any of them is an error."""

    @staticmethod
    def forward(ctx: Any, why: str, value: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(ctx.why)


def asking(*values: Any) -> list[torch.Tensor]:
    """The tensors among these for which autograd would keep what is computed from them now."""
    if not torch.is_grad_enabled():
        return []
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def refused(out: Any, sources: Sequence[torch.Tensor], why: str = WHY) -> Any:
    """What was computed from `sources`, with every gradient refused; caches and other objects are left as they are."""
    if not sources:
        return out
    if isinstance(out, torch.Tensor):
        if not (out.is_floating_point() or out.is_complex()):
            return out
        return _Refused.apply(why, out.detach(), *sources)  # type: ignore[no-untyped-call]
    if type(out) in (tuple, list):
        return type(out)(refused(each, sources, why) for each in out)
    if isinstance(out, Mapping):  # transformers' outputs
        for key in list(out):
            if isinstance(out[key], torch.Tensor) or type(out[key]) in (tuple, list):
                out[key] = refused(out[key], sources, why)  # type: ignore[index]
    return out


def without_gradient(compute: Callable[[], torch.Tensor], *inputs: Any, why: str = WHY) -> torch.Tensor:
    """What `compute` gives, with a gradient that is refused where torch would have kept one."""
    if not torch.is_grad_enabled():
        return compute()
    with torch.no_grad():
        out = compute()
    answer: torch.Tensor = refused(out, asking(*inputs), why)
    return answer


class Guarded(torch.Tensor):
    """A weight in memory that is not its own for long, where gradients are on.

    Attributes:
        plain: the weight itself.
    """

    plain: torch.Tensor

    @staticmethod
    def __new__(cls, plain: torch.Tensor, requires_grad: bool) -> Guarded:
        self: Guarded = torch.Tensor._make_subclass(cls, plain.detach(), requires_grad)
        self.plain = plain.detach()
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func.__name__ == "__get__" and _getter(func) in _PLAIN_GETTERS) or func is torch.Tensor.requires_grad_:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        plain = tree_map(_plain, (args, kwargs))
        if not torch.is_grad_enabled():
            return func(*plain[0], **plain[1])
        with torch.no_grad():
            out = func(*plain[0], **plain[1])
        asked = asking(args, kwargs)
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Guarded)]
        held = {weight.plain.untyped_storage().data_ptr() for weight in weights}
        wanted = any(weight.requires_grad for weight in weights)

        def guard(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.untyped_storage().data_ptr() in held:
                return Guarded(value, wanted)
            return refused(value, asked)

        return tree_map(guard, out)


def guarded(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it may be bound now: guarded where gradients are on."""
    if type(weight) is not torch.Tensor or not torch.is_grad_enabled():
        return weight
    return Guarded(weight, weight.requires_grad)


def _getter(func: Any) -> str:
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, Guarded) else value
