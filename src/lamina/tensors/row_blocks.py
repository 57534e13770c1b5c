"""Weights that never exist as a whole: a linear in blocks of rows, experts one at a time.

Both are tensor subclasses that stand in the module in place of the parameter. The operations that the
trace saw on them are answered block by block, as the blocks arrive; any other one reads the whole weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.tensors.disk import DiskTensor, WeightHome, not_pickled, without_memory
from lamina.tensors.guard import Guarded, without_gradient

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
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _SET_REQUIRES_GRAD or func is torch.Tensor.requires_grad_:
            with torch._C.DisableTorchFunctionSubclass():
                func(args[0].whole, *args[1:], **kwargs)
                return func(*args, **kwargs)
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **kwargs)
            if isinstance(weight, Blocks) and weight.linear is not None and not isinstance(x, Blocks):
                linear = weight.linear
                return without_gradient(lambda: linear(x, bias), x, weight, bias)
        if args and isinstance(args[0], Blocks) and args[0].expert is not None and not kwargs:
            picked = _expert(func, *args)
            if picked is not None:
                return picked
        if func in (torch.bmm, torch.Tensor.bmm):
            x, weight = _bmm_arguments(*args, **kwargs)
            if isinstance(weight, Blocks) and weight.batched is not None and not isinstance(x, Blocks):
                batched = weight.batched
                return without_gradient(lambda: batched(x), x, weight)
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

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


def _expert(func: Any, weight: Blocks, *args: Any) -> torch.Tensor | None:
    """One expert of a weight, or the weight in a shape that divides it into experts; None for anything else."""
    assert weight.expert is not None
    if func in (torch.Tensor.view, torch.Tensor.reshape) and not isinstance(args[0], torch.dtype):
        with torch._C.DisableTorchFunctionSubclass():
            shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta").view(*args).shape
        return weight.reshaped(shape) if len(shape) and shape[0] == weight.experts else None
    if func is torch.Tensor.__getitem__ and weight.shape[0] == weight.experts:
        (index,) = args
        if isinstance(index, bool) or not (isinstance(index, int) or is_number(index)):
            return None
        number = int(index)
        if -weight.experts <= number < weight.experts:
            picked = weight.expert(number % weight.experts).view(weight.shape[1:])
            return Guarded(picked, weight.requires_grad) if torch.is_grad_enabled() and _is_plain(picked) else picked
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) is torch.Tensor


def is_number(value: Any) -> bool:
    """Whether it is a tensor without dimensions that holds a number, which a bool is not."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype is not torch.bool


def _whole(value: Any) -> Any:
    if not isinstance(value, Blocks):
        return value
    return value.whole if value.shape == value.whole.shape else value.whole.view(value.shape)
