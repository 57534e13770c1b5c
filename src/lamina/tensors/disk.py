"""Tensors that stand for bytes on disk.

A `DiskTensor` has the shape, dtype and device of a checkpoint tensor and no memory. While a `recording`
is open, every operation on one without a home is written down instead of computed, so that transformers' own loader,
run on DiskTensors, tells where each parameter of the model comes from: renames, stacks, concatenations,
splits and casts leave a parameter as a set of *boxes* (strided regions of checkpoint tensors); anything
else leaves the recorded expression, which can be replayed on real data.

Outside a recording an operation on a DiskTensor reads the data first: a streamed weight that somebody
touches outside its module's forward is slow, but right. One that writes to it is handed what the weight's `WeightHome`
keeps in its place from then on. Views stay DiskTensors, so that writing through them is writing to the weight.

Boxes are computed by torch itself: each one carries a meta view of its checkpoint tensor, and view
operations are applied to that view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lamina.errors import StorageError, UnsupportedError

aten = torch.ops.aten
_CPU = torch.device("cpu")

_IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
}
_LEAVING = frozenset(
    {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__}
)  # torch, for other containers
_POINTED = frozenset(
    getattr(torch.Tensor, name)
    for name in "data_ptr const_data_ptr storage untyped_storage _typed_storage _storage share_memory_ apply_ map_ "
    "map2_ set_ resize resize_as".split()
    if hasattr(torch.Tensor, name)
)
"""What asks for the memory of a tensor, or goes through it by pointers."""
_SCALINGS = {aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar}
SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_recordings = 0
_same: Callable[[str, str], bool] | None = None


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


class WeightHome(Protocol):
    """Where the data of a weight is, once its model is attached to a checkpoint."""

    def read(self) -> torch.Tensor:
        """All of it."""

    def gather(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows of it, of shape (*ids.shape, columns); None where only all of it can be read."""

    def part(self, first: int, count: int) -> torch.Tensor:
        """`count` indices of its first dimension."""

    def written(self) -> torch.Tensor:
        """What stands for the weight from now on, in memory, for an operation that writes to it."""

    def scale(self, func: Callable[..., Any], number: float) -> bool:
        """Have an in-place operation with one number done whenever the weight arrives; False where that cannot be."""

    def replace(self, data: torch.Tensor) -> None:
        """Let this be the weight from now on, as `weight.data = data` asks."""


@dataclass(frozen=True, slots=True)
class _ViewHome:
    """The home of a view: the data of another one, seen through `view`."""

    whole: WeightHome
    view: Callable[[torch.Tensor], torch.Tensor]
    row: int | None = None  # of the whole, where the view is one

    def read(self) -> torch.Tensor:
        if self.row is not None and (found := self.whole.gather(torch.tensor(self.row))) is not None:
            return found
        return self.view(self.whole.read())

    def gather(self, ids: torch.Tensor) -> torch.Tensor | None:
        return None

    def part(self, first: int, count: int) -> torch.Tensor:
        return self.read()[first : first + count]

    def written(self) -> torch.Tensor:
        return self.view(self.whole.written())

    def scale(self, func: Callable[..., Any], number: float) -> bool:
        return False

    def replace(self, data: torch.Tensor) -> None:
        raise UnsupportedError("a part of a streamed weight was given other data: write into it with copy_ instead")


class DiskTensor(torch.Tensor):
    """A tensor whose data is on disk.

    Attributes:
        meta: its shape, dtype and strides.
        expression: how to compute it from checkpoint tensors.
        boxes: where its elements lie in checkpoint tensors, or None where only the expression tells.
        cast_from: dtype in the checkpoint where a cast follows the boxes, else None.
        home: where its data is; set when a model is attached to a checkpoint.
    """

    meta: torch.Tensor
    expression: Expression
    boxes: tuple[Box, ...] | None
    cast_from: torch.dtype | None
    home: WeightHome | None
    __dlpack_c_exchange_api__ = None  # of torch.Tensor, it goes past `__dlpack__` to memory that is not there

    @staticmethod
    def __new__(
        cls,
        meta: torch.Tensor,
        expression: Expression,
        boxes: tuple[Box, ...] | None,
        cast_from: torch.dtype | None = None,
        device: torch.device = _CPU,
    ) -> DiskTensor:
        self: DiskTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),  # torch reshapes by view or by copy as they say
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
            requires_grad=False,
        )
        without_memory(self)
        self.expression, self.boxes, self.cast_from = expression, boxes, cast_from
        self.meta, self.home = meta, None
        return self

    def seen(self) -> DiskTensor:
        """The same data in another tensor, of which no gradient is asked."""
        other = DiskTensor(self.meta, self.expression, self.boxes, self.cast_from, self.device)
        other.home = self.home
        return other

    def viewed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DiskTensor:
        """A view: DiskTensor too, for whoever writes through it."""
        assert self.home is not None
        meta = func(self.meta, *args, **kwargs)
        row = None
        if func is aten.select.int and args[0] % self.dim() == 0 and -self.shape[0] <= args[1] < self.shape[0]:
            row = args[1] % self.shape[0]
        view = DiskTensor(meta, self.expression, None, None, self.device)
        view.home = _ViewHome(self.home, lambda whole: func(whole, *args, **kwargs), row)
        return view

    def on(self, device: torch.device) -> DiskTensor:
        """The same tensor, which says that it is on `device`, as its data will be."""
        return DiskTensor(self.meta, self.expression, self.boxes, self.cast_from, device)

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> DiskTensor:
        """The checkpoint tensor `name` itself."""
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return cls(meta, Leaf(name), (Box(name, meta, (0,) * meta.dim()),))

    @classmethod
    def computed(
        cls, func: Callable[..., torch.Tensor], names: Sequence[str], shape: Sequence[int], dtype: torch.dtype
    ) -> DiskTensor:
        """Stands for what `func` computes from the checkpoint tensors of these names."""
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        source = Computed(func, tuple(names), tuple(shape))
        expression = Op(func, tuple(Leaf(name) for name in names), {}, None)
        return cls(meta, expression, (Box(source, meta, (0,) * meta.dim()),))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DiskTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _recordings and _being_built(args, kwargs):
            return _equal(args[0], args[1]) if func is aten.equal.default else _record(func, args, kwargs)
        if func is aten.detach.default or func is aten.alias.default:
            return args[0].seen()
        if func is aten.embedding.default and isinstance(args[0], DiskTensor) and args[0].home is not None:
            found = args[0].home.gather(args[1])
            if found is not None:
                return found
        if func._schema.is_mutable:
            return write(func, args, kwargs, materialize)
        if views(func) and isinstance(args[0], DiskTensor) and args[0].home is not None:
            return args[0].viewed(func, args[1:], kwargs)
        return func(*tree_map(materialize, args), **tree_map(materialize, kwargs))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == SET_DATA and isinstance(args[0], DiskTensor) and args[0].home is not None:
            if args[1] is not args[0]:
                args[0].home.replace(args[1])
            return None
        if func in _POINTED:
            raise no_storage(func)
        if func in _LEAVING and isinstance(args[0], DiskTensor):
            return func(materialize(args[0]).requires_grad_(args[0].requires_grad), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A copy that is in memory."""
        copied = materialize(self).detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = made = (
            nn.Parameter(copied, self.requires_grad) if getattr(self, "_is_param", False) else copied
        )
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled()


def without_memory(tensor: torch.Tensor) -> None:
    """Have C++ that asks for the data of a tensor told that there is none, where it would take address 0 for it."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def no_storage(func: Any) -> StorageError:
    """The error for what asks for the memory of a weight that has none of its own."""
    return StorageError(
        f"{getattr(func, '__name__', func)} needs the memory of a weight, and one that streams or is packed has none "
        f"of its own: weight.clone() is a copy in memory, copy_ writes to it, model.save_pretrained(folder) saves it"
    )


def pointed(func: Any) -> bool:
    """Whether a function of torch goes to the memory of a tensor, past every operation."""
    return func in _POINTED


def not_pickled() -> UnsupportedError:
    """The error for pickling a weight."""
    return UnsupportedError(
        "a weight that streams cannot be pickled, nor saved with torch.save, which holds all of a model in memory: "
        "model.save_pretrained(folder) writes it weight by weight"
    )


@contextmanager
def recording(same: Callable[[str, str], bool] | None = None) -> Iterator[None]:
    """Within this block operations on DiskTensors are written down, in every thread.

    Those that have a home are weights of a model that may be running in another thread: they are read as always.

    Args:
        same: whether two checkpoint tensors hold the same numbers; transformers asks before it ties weights.
    """
    global _recordings, _same
    _recordings += 1  # transformers converts in a thread pool: a thread-local flag would not reach it
    before, _same = _same, same
    try:
        yield
    finally:
        _recordings -= 1
        _same = before


def _being_built(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is one on tensors that belong to no model yet."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DiskTensor)]
    return not any(tensor.home is not None for tensor in tensors)


def materialize(value: Any) -> Any:
    """The real tensor behind a DiskTensor; any other value as it is."""
    if not isinstance(value, DiskTensor):
        return value
    if value.home is None:
        raise RuntimeError(f"{value!r} is not attached to a checkpoint")
    return value.home.read()


def views(func: Any) -> bool:
    """Whether an operation gives one view of its first argument."""
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and isinstance(returns[0].type, torch.TensorType)


def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], read: Callable[[Any], Any]) -> Any:
    """An operation that writes to some of its arguments: to what stands for them from now on.

    Args:
        read: gives the real tensor in place of one that stands for it; any other value as it is.
    """
    first = getattr(args[0], "home", None) if args else None
    if torch.Tag.inplace_view in func.tags and func is not aten.detach_.default:
        raise no_storage(func)
    if first is not None and func in _SCALINGS and isinstance(args[1], int | float) and first.scale(func, args[1]):
        return args[0]
    if first is not None and func is aten.copy_.default and getattr(args[1], "home", None) is first:
        return args[0]  # what it holds already
    named = {each.name: each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments}
    written: dict[int, torch.Tensor] = {}

    def target(value: Any) -> Any:
        if not hasattr(value, "home"):
            return value
        if value.home is None:
            raise UnsupportedError(
                f"a weight of shape {tuple(value.shape)} was written to while it is in use, which one that streams or "
                f"is packed cannot keep: write to it before the model runs"
            )
        real = value.home.written()
        written[id(real)] = value
        return real

    def real(name: str, value: Any) -> Any:
        return tree_map(target if named[name] else read, value)

    given = [real(each.name, value) for each, value in zip(func._schema.arguments, args, strict=False)]
    out = func(*given, **{name: real(name, value) for name, value in kwargs.items()})
    return tree_map(lambda value: written.get(id(value), value), out)


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


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are the same, as far as can be told: else they are taken for different."""
    if not (isinstance(one, DiskTensor) and isinstance(other, DiskTensor) and one.shape == other.shape):
        return False
    boxes = [*(one.boxes or ()), *(other.boxes or ())]
    if len(boxes) != 2 or (one.dtype, one.cast_from) != (other.dtype, other.cast_from):
        return False
    views = [(tuple(box.view.stride()), box.view.storage_offset()) for box in boxes]
    if views[0] != views[1]:
        return False
    if boxes[0].source == boxes[1].source:
        return True
    names = [box.source for box in boxes if isinstance(box.source, str)]
    return _same is not None and len(names) == 2 and _same(names[0], names[1])


def _record(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def meta(value: Any) -> Any:
        if isinstance(value, DiskTensor):
            return value.meta
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def node(value: Any) -> Any:
        return value.expression if isinstance(value, DiskTensor) else value

    on_meta = {key: "meta" if key == "device" else meta(value) for key, value in kwargs.items()}
    out = func(*tree_map(meta, args), **on_meta)
    traced_args, traced_kwargs = tree_map(node, args), tree_map(node, kwargs)
    if isinstance(out, torch.Tensor):
        boxes, cast_from = _boxes(func, args, out, None)
        return DiskTensor(out, Op(func, traced_args, traced_kwargs, None), boxes, cast_from)
    if not isinstance(out, list | tuple):
        return out
    parts = []
    for index, part in enumerate(out):
        boxes, cast_from = _boxes(func, args, part, index)
        parts.append(DiskTensor(part, Op(func, traced_args, traced_kwargs, index), boxes, cast_from))
    return type(out)(parts) if isinstance(out, list) else tuple(parts)


def _boxes(
    func: Any, args: tuple[Any, ...], out: torch.Tensor, index: int | None
) -> tuple[tuple[Box, ...] | None, torch.dtype | None]:
    """Boxes and pending cast of `func(*args)[index]`, or (None, None) where boxes cannot say it."""
    if func in (aten.cat.default, aten.stack.default):
        return _joined(func, args, out)
    base = args[0]
    if not isinstance(base, DiskTensor) or base.boxes is None:
        return None, None
    if func in _IDENTITY:
        if out.dtype == base.dtype:
            return base.boxes, base.cast_from
        return (base.boxes, base.dtype) if base.cast_from is None else (None, None)
    if len(base.boxes) == 1 and all(s == 0 for s in base.boxes[0].start):
        return _box_viewed(func, args, base, index)
    if func is aten.transpose.int:
        order = list(range(base.dim()))
        a, b = args[1] % base.dim(), args[2] % base.dim()
        order[a], order[b] = order[b], order[a]
        moved = tuple(Box(x.source, x.view.permute(order), tuple(x.start[i] for i in order)) for x in base.boxes)
        return moved, base.cast_from
    return None, None


def _box_viewed(
    func: Any, args: tuple[Any, ...], base: DiskTensor, index: int | None
) -> tuple[tuple[Box, ...] | None, torch.dtype | None]:
    """A view operation on a tensor that is one box: torch applies it to the box's own view."""
    assert base.boxes is not None
    box = base.boxes[0]
    if not all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return None, None
    try:
        view = func(box.view, *args[1:])
    except RuntimeError:  # a reshape that the strides do not allow
        return None, None
    view = view if index is None else view[index]
    return (Box(box.source, view, (0,) * view.dim()),), base.cast_from


def _joined(func: Any, args: tuple[Any, ...], out: torch.Tensor) -> tuple[tuple[Box, ...] | None, torch.dtype | None]:
    parts: Sequence[torch.Tensor] = args[0]
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    casts = {getattr(part, "cast_from", None) for part in parts}
    if len(casts) > 1 or not all(isinstance(part, DiskTensor) and part.boxes is not None for part in parts):
        return None, None
    boxes: list[Box] = []
    at = 0
    for part in parts:
        assert isinstance(part, DiskTensor) and part.boxes is not None
        for box in part.boxes:
            if func is aten.stack.default:
                start = (*box.start[:dim], at, *box.start[dim:])
                boxes.append(Box(box.source, box.view.unsqueeze(dim), start))
            else:
                start = (*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :])
                boxes.append(Box(box.source, box.view, start))
        at += 1 if func is aten.stack.default else part.shape[dim]
    return tuple(boxes), casts.pop()
