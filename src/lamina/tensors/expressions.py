"""What a weight is made of: regions of checkpoint tensors, or an expression that computes it from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map


@dataclass(frozen=True, slots=True)
class Computed:
    """What is computed from whole checkpoint tensors: rows of it can be had where `func` gives them.

    Attributes:
        func: called with the tensors of these names.
        names: of checkpoint tensors.
        shape: of what comes out.
    """

    func: Callable[..., torch.Tensor]
    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A strided region of one checkpoint tensor and the place it has in a larger tensor.

    Attributes:
        source: name of the checkpoint tensor, or what stands for one.
        view: meta tensor; its shape, strides and storage offset say which elements of the source.
        start: index of the region's first element in the larger tensor, one per dimension.
    """

    source: str | Computed
    view: torch.Tensor
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a recorded expression: the whole checkpoint tensor of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """A recorded operation; `index` picks one tensor where `func` gives several."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None


Expression = Leaf | Op


def replay(expression: Expression, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Compute a recorded expression; `load(name)` gives a checkpoint tensor."""
    if isinstance(expression, Leaf):
        return load(expression.name)

    def real(value: Any) -> Any:
        return replay(value, load) if isinstance(value, Leaf | Op) else value

    out = expression.func(*tree_map(real, expression.args), **tree_map(real, dict(expression.kwargs)))
    result: torch.Tensor = out if expression.index is None else out[expression.index]
    return result


def sources_of(expression: Expression) -> list[str]:
    """Names of the checkpoint tensors in an expression, each once, in order of use."""
    if isinstance(expression, Leaf):
        return [expression.name]
    names: dict[str, None] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Leaf | Op):
            names.update(dict.fromkeys(sources_of(value)))
        return value

    tree_map(visit, (expression.args, dict(expression.kwargs)))
    return list(names)
