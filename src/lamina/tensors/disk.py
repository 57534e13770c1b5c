"""Tensors that stand for bytes on disk.

A `DiskTensor` has the shape, dtype and device of a checkpoint tensor and no memory. While a `recording`
is open, every operation on one without a home is written down instead of computed, so that transformers' own loader,
run on DiskTensors, tells where each parameter of the model comes from: renames, stacks, concatenations,
splits and casts leave a parameter as a set of *boxes* (strided regions of checkpoint tensors); anything
else leaves the recorded expression, which can be replayed on real data.

Outside a recording an operation on a DiskTensor reads the data first: a streamed weight that is
touches outside its module's forward is slow, but right. One that writes to it is handed what the weight's `WeightHome`
keeps in its place from then on. Views stay DiskTensors, so that writing through them is writing to the weight.

Boxes are computed by torch itself: each one carries a meta view of its checkpoint tensor, and view
operations are applied to that view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lamina.checkpoint import TensorEntry
from lamina.errors import StorageError, UnsupportedError
from lamina.tensors.expressions import Box, Computed, Expression, Leaf, Op

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
_AGAIN = {aten.detach.default, aten.alias.default}
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
TORCH_DTYPES: Mapping[str, torch.dtype] = {
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
"""torch's dtypes by the names that checkpoints have for them."""

_recordings = 0
_same: Callable[[str, str], bool] | None = None


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
        """A view: a DiskTensor too, so that writes through it are seen."""
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
        if func in _AGAIN:
            return args[0].seen()
        home = _home_of(args)
        if func is aten.embedding.default and home is not None and (found := home.gather(args[1])) is not None:
            return found
        if func._schema.is_mutable:
            return write(func, args, kwargs, materialize)
        if home is not None and views(func):
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


def _home_of(args: tuple[Any, ...]) -> WeightHome | None:
    """The home of an operation's first argument, where that is a placeholder with one."""
    first = args[0] if args else None
    return first.home if isinstance(first, DiskTensor) else None


def as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    """torch's own function on a tensor that stands for a weight: what computes comes back through its dispatch."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def without_memory(tensor: torch.Tensor) -> None:
    """Make C++ that asks for the data of this tensor fail, where it would take address 0 for the data."""
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
    if torch.Tag.inplace_view in func.tags and func is not aten.detach_.default:
        raise no_storage(func)
    if args and _needs_no_data(func, args):
        return args[0]
    named = {each.name: each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments}
    written: dict[int, torch.Tensor] = {}

    def real(name: str, value: Any) -> Any:
        return tree_map(functools.partial(_target, written) if named[name] else read, value)

    given = [real(each.name, value) for each, value in zip(func._schema.arguments, args, strict=False)]
    out = func(*given, **{name: real(name, value) for name, value in kwargs.items()})
    return tree_map(lambda value: written.get(id(value), value), out)


def _needs_no_data(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a write is done without its weight's data: it scales what arrives, or writes what is there already."""
    home = getattr(args[0], "home", None)
    if home is None:
        return False
    if func in _SCALINGS:
        return isinstance(args[1], int | float) and bool(home.scale(func, args[1]))
    return func is aten.copy_.default and getattr(args[1], "home", None) is home


def _target(written: dict[int, torch.Tensor], value: Any) -> Any:
    """What is written to in place of `value`, and kept in `written` by its id."""
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


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are known to be the same; where that is unknown they count as different."""
    mine, theirs = _form(one), _form(other)
    if mine is None or mine != theirs:
        return False
    first, second = one.boxes[0].source, other.boxes[0].source
    if first == second:
        return True
    return _same is not None and isinstance(first, str) and isinstance(second, str) and _same(first, second)


def _form(tensor: Any) -> tuple[Any, ...] | None:
    """How a tensor sees its source, where it is one box of one; None for any other."""
    if not isinstance(tensor, DiskTensor) or tensor.boxes is None or len(tensor.boxes) != 1:
        return None
    view = tensor.boxes[0].view
    return tensor.shape, tensor.dtype, tensor.cast_from, view.stride(), view.storage_offset()


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
    return (_transposed(base, args[1], args[2]), base.cast_from) if func is aten.transpose.int else (None, None)


def _transposed(base: DiskTensor, first: int, second: int) -> tuple[Box, ...]:
    """The boxes of a tensor with two dimensions exchanged."""
    assert base.boxes is not None
    order = list(range(base.dim()))
    order[first], order[second] = order[second], order[first]
    return tuple(Box(x.source, x.view.permute(order), tuple(x.start[i] for i in order)) for x in base.boxes)


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
    kinds = {(part.dtype, getattr(part, "cast_from", None)) for part in parts}  # of several torch casts some
    if len(kinds) > 1 or not all(isinstance(part, DiskTensor) and part.boxes is not None for part in parts):
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
    return tuple(boxes), kinds.pop()[1]
