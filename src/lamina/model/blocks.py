"""Weights that never exist as a whole: a linear in blocks of rows, experts one at a time.

Both are tensor subclasses that stand in the module in place of the parameter. The one operation that the
trace saw on them is answered block by block, as the blocks arrive; any other one reads the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.model.disk_tensor import DiskTensor


class Blocks(torch.Tensor):
    """A weight that is served in blocks along dimension 0.

    Attributes:
        whole: the weight as a DiskTensor, for operations that need all of it.
        linear: computes `x @ weight.T + bias` block by block.
        expert: gives index `i` of dimension 0, valid until the next one is asked for.
    """

    whole: DiskTensor
    linear: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None
    expert: Callable[[int], torch.Tensor] | None

    @staticmethod
    def __new__(cls, whole: DiskTensor) -> Blocks:
        self: Blocks = torch.Tensor._make_wrapper_subclass(
            cls, whole.shape, dtype=whole.dtype, device=whole.device, requires_grad=False
        )
        self.whole, self.linear, self.expert = whole, None, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Blocks(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, Blocks) and weight.linear is not None and not isinstance(x, Blocks):
                return weight.linear(x, bias)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Blocks) and args[0].expert is not None:
            index = args[1]
            if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0):
                return args[0].expert(int(index))
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs or {}))


_METADATA = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size, torch.Tensor.__len__,
             torch.Tensor.is_floating_point, torch.Tensor.requires_grad_, torch.Tensor.__hash__}  # fmt: skip


def _linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias


def _whole(value: Any) -> Any:
    return value.whole if isinstance(value, Blocks) else value
