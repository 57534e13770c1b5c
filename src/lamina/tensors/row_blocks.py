"""Weights that never exist as a whole: a linear in blocks of rows, experts one at a time.

Both are tensor subclasses that stand in the module in place of the parameter. The operations that the
trace saw on them are answered block by block, as the blocks arrive; any other one reads the whole weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.tensors.disk import DiskTensor, WeightHome, as_it_is, not_pickled, without_memory
from lamina.tensors.guard import Guarded, without_gradient

Way = Callable[[Any, Any, Any], Any]
"""How a function of torch is computed on such a weight: called with the function, its arguments, its keywords."""

_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class Blocks(torch.Tensor):
    """A weight that is served in blocks along dimension 0.

    Attributes:
        whole: the weight as a DiskTensor, for operations that need all of it.
        linear: computes `x @ weight.T + bias` block by block.
        experts: how many experts lie one after another along dimension 0.
        expert: gives the rows of one of them, valid until the next one is asked for.
        batched: computes `bmm(x, weight)`, x of shape (experts, tokens, inputs), without the experts for which
            all of x is zero.
    """

    whole: DiskTensor
    linear: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None
    experts: int
    expert: Callable[[int], torch.Tensor] | None
    batched: Callable[[torch.Tensor], torch.Tensor] | None
    __dlpack_c_exchange_api__ = None

    @staticmethod
    def __new__(cls, whole: DiskTensor, shape: torch.Size | None = None) -> Blocks:
        self: Blocks = torch.Tensor._make_wrapper_subclass(
            cls, whole.shape if shape is None else shape, dtype=whole.dtype, device=whole.device, requires_grad=False
        )
        without_memory(self)
        self.whole, self.linear, self.experts, self.expert, self.batched = whole, None, 0, None, None
        return self

    @property
    def home(self) -> WeightHome | None:
        """Where the data of the weight is."""
        return self.whole.home

    def reshaped(self, shape: torch.Size) -> Blocks:
        """The same weight, seen in another shape."""
        seen = Blocks(self.whole, shape)
        seen.experts, seen.expert = self.experts, self.expert
        seen.batched = self.batched if shape == self.whole.shape else None
        return seen

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Blocks(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A copy that is in memory."""
        memo[id(self)] = copied = copy.deepcopy(self.whole, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _way_of(func)(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs or {}))


METADATA = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size, torch.Tensor.__len__,
             torch.Tensor.is_floating_point, torch.Tensor.__hash__}  # fmt: skip


def linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Input, weight and bias of a call of `torch.nn.functional.linear`, however they were named in it."""
    return input, weight, bias


def _bmm_arguments(input: torch.Tensor, mat2: torch.Tensor, *, out: Any = None) -> tuple[torch.Tensor, Any]:
    return input, mat2 if out is None else None


@lru_cache(maxsize=1024)
def _way_of(func: Any) -> Way:
    """How a function of torch is computed where a `Blocks` is among its arguments."""
    if getattr(func, "__name__", "") == "__get__" or func in METADATA:
        return as_it_is
    return _WAYS.get(func, _with_whole)


def _with_whole(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


def _set_requires_grad(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        func(args[0].whole, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = linear_arguments(*args, **kwargs)
    if isinstance(weight, Blocks) and weight.linear is not None and not isinstance(x, Blocks):
        linear = weight.linear
        return without_gradient(lambda: linear(x, bias), x, weight, bias)
    return _with_whole(func, args, kwargs)


def _bmm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = _bmm_arguments(*args, **kwargs)
    if isinstance(weight, Blocks) and weight.batched is not None and not isinstance(x, Blocks):
        batched = weight.batched
        return without_gradient(lambda: batched(x), x, weight)
    return _with_whole(func, args, kwargs)


def _divided(func: Any, args: Any, kwargs: Any) -> Any:
    """The weight in a shape that divides it into experts."""
    weight = _experts(args, kwargs)
    if weight is not None and not isinstance(args[1], torch.dtype):
        shape = shape_of_view(weight, args[1:])
        if len(shape) and shape[0] == weight.experts:
            return weight.reshaped(shape)
    return _with_whole(func, args, kwargs)


def _picked(func: Any, args: Any, kwargs: Any) -> Any:
    """One expert of a weight."""
    weight = _experts(args, kwargs)
    number = None if weight is None else picked_index(weight, args[1])
    if weight is None or weight.expert is None or number is None or weight.shape[0] != weight.experts:
        return _with_whole(func, args, kwargs)
    picked = weight.expert(number).view(weight.shape[1:])
    return Guarded(picked, weight.requires_grad) if torch.is_grad_enabled() and type(picked) is torch.Tensor else picked


def _experts(args: Any, kwargs: Any) -> Blocks | None:
    """The first of a function's arguments, where it is a weight that gives its experts."""
    weight = args[0] if args and not kwargs else None
    return weight if isinstance(weight, Blocks) and weight.expert is not None else None


_WAYS: dict[Any, Way] = {
    _SET_REQUIRES_GRAD: _set_requires_grad,
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.nn.functional.linear: _linear,
    torch.bmm: _bmm,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.view: _divided,
    torch.Tensor.reshape: _divided,
    torch.Tensor.__getitem__: _picked,
}


def shape_of_view(weight: torch.Tensor, size: Any) -> torch.Size:
    """The shape that `view(*size)` gives a weight."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta").view(*size).shape


def picked_index(weight: torch.Tensor, index: Any) -> int | None:
    """The index of dimension 0, from 0 on, that `weight[index]` takes alone; None for any other or one that is out."""
    if isinstance(index, torch.Tensor):
        if index.dim() or index.dtype is torch.bool:
            return None
    elif not isinstance(index, int) or isinstance(index, bool):
        return None
    number = int(index)
    return number % weight.shape[0] if -weight.shape[0] <= number < weight.shape[0] else None


def _whole(value: Any) -> Any:
    if not isinstance(value, Blocks):
        return value
    return value.whole if value.shape == value.whole.shape else value.whole.view(value.shape)
