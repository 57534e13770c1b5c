"""Weights that stay as they are stored, and become numbers where they are used.

A `PackedTensor` stands in a module in place of the parameter. A linear is answered by the codec's own product, or by
unpacking one block of rows after the other into a scratch area and multiplying with it; a lookup unpacks the rows
that are looked up; one expert of several is a `PackedTensor` again. Any other operation unpacks the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.codec import codec_for
from lamina.errors import UnsupportedError
from lamina.plan.layout import ROW_MULTIPLE
from lamina.plan.schedule import PanelSpan
from lamina.stream.observe import THROUGH, UNPACK, timed
from lamina.tensors.disk import (
    SET_DATA,
    DiskTensor,
    WeightHome,
    as_it_is,
    materialize,
    no_storage,
    not_pickled,
    pointed,
    views,
    without_memory,
    write,
)
from lamina.tensors.guard import PACKED, asking, refused
from lamina.tensors.ids import check_ids
from lamina.tensors.padded_rows import product
from lamina.tensors.row_blocks import METADATA, Way, linear_arguments, picked_index, shape_of_view

aten = torch.ops.aten
_WRITERS = frozenset(
    f"__{name}__" for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor setitem".split()
)
_Tensor: Any = torch.Tensor
KEPT = frozenset({_Tensor.detach, _Tensor.requires_grad_, _Tensor.requires_grad.__set__})
_VIEWS = "__getitem__ view reshape t transpose permute narrow select flatten view_as unsqueeze squeeze chunk split"
SEEN = frozenset(getattr(_Tensor, name) for name in _VIEWS.split())
BLOCK = 4 << 20  # bytes of unpacked rows at a time: few enough to stay in a processor's cache
WIDEST_BLOCK = 4096  # rows up to which a block is a multiple of a panel and of `ROW_MULTIPLE`


class Scratch:
    """Memory that one block of unpacked rows after the other is written to; made on first use."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, torch.Tensor] = {}

    def rows(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for a block, of shape (rows, columns); the one before is overwritten."""
        nbytes = rows * columns * dtype.itemsize
        memory = self._memory.get(device)
        if memory is None or memory.numel() < nbytes:
            self._memory.pop(device, None)
            memory = self._memory[device] = torch.empty(max(nbytes, BLOCK), dtype=torch.uint8, device=device)
        return memory[:nbytes].view(dtype).view(rows, columns)


def block_rows(columns: int, itemsize: int, codec: str, panel_rows: int) -> int:
    """Rows that are unpacked at once."""
    step = ROW_MULTIPLE if codec_for(codec).has_rows else math.lcm(ROW_MULTIPLE, panel_rows)
    step = step if step <= WIDEST_BLOCK else panel_rows
    return max(BLOCK // (columns * itemsize) // step, 1) * step


@dataclass(frozen=True, slots=True)
class _One:
    """A weight of two dimensions that is one call of a codec's quick product; kept, so that a call costs little."""

    product: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], bool]
    panels: torch.Tensor
    rows: int
    columns: int
    dtype: torch.dtype


class PackedTensor(torch.Tensor):
    """A weight in panels.

    Attributes:
        memory: uint8, what its spans count their bytes in.
        spans: its rows in order: those of the matrix whose columns are the last dimension.
        scratch: where blocks of rows are unpacked to.
        whole: computes all of it, where no codec's panels hold it.
        order: int64; row i of the weight is row `order[i]` of the panels. None where they are the same.
        quick: a linear may take the codec's quick product, which rounds what it multiplies with: for drafts.
    """

    memory: torch.Tensor
    spans: tuple[PanelSpan, ...]
    scratch: Scratch
    whole: Callable[[torch.Tensor], torch.Tensor] | None
    order: torch.Tensor | None
    quick: bool = False
    home: WeightHome | None = None  # of one that stays in memory: what is written to it goes there
    _one: _One | None = None
    __dlpack_c_exchange_api__ = None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        memory: torch.Tensor,
        spans: tuple[PanelSpan, ...],
        scratch: Scratch,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
        order: torch.Tensor | None = None,
    ) -> PackedTensor:
        self: PackedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=memory.device, requires_grad=False
        )
        without_memory(self)
        self.memory, self.spans, self.scratch, self.whole, self.order = memory, spans, scratch, whole, order
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.memory.numel()} bytes)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled()

    @timed(UNPACK, "unpack")
    def unpack(self) -> torch.Tensor:
        """All of it, as a plain tensor."""
        if self.whole is not None:
            return self.whole(self.memory).to(self.dtype).view(self.shape)
        columns = self.shape[-1]
        out = torch.empty(self.numel() // max(columns, 1), columns, dtype=self.dtype, device=self.device)
        at = 0
        for span in self.spans:
            self._unpack(span, 0, span.rows, out[at : at + span.rows])
            at += span.rows
        return (out if self.order is None else out[self.order]).view(self.shape)

    @timed(THROUGH, "linear")
    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ self.T + bias`, for a weight of two dimensions.

        Args:
            x: shape (..., columns).
        """
        if self.whole is not None:
            # torch picks kernels by this flag even under no_grad: plain transformers has it set
            return torch.nn.functional.linear(x, self.unpack().requires_grad_(), bias)
        if self.order is not None and bias is not None:
            bias = bias[torch.argsort(self.order)]  # of the rows as they are stored
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        flat, flat_out = x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, self.shape[0])
        at = 0
        for span in self.spans:
            rows = slice(at, at + span.rows)
            if span.skip == 0 and self._product(flat, span, flat_out[:, rows]):
                if bias is not None:
                    flat_out[:, rows] += bias[rows]
            else:
                self._multiply(x, span, None if bias is None else bias[rows], out[..., rows])
            at += span.rows
        return out if self.order is None else out[..., self.order]

    @timed(THROUGH, "look_up")
    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a weight of two dimensions, of shape (*ids.shape, columns).

        Raises:
            TokenError: an id is no row of it.
        """
        check_ids(ids, self.shape[0], getattr(self.home, "name", "a packed table"))
        if self.whole is not None:
            return self.unpack()[ids]
        unique, inverse = torch.unique(ids, return_inverse=True)
        wanted = (unique if self.order is None else self.order[unique.to(self.order.device)]).tolist()
        out = torch.empty(len(wanted), self.shape[1], dtype=self.dtype, device=self.device)
        for place, row in enumerate(wanted):
            for span in self.spans:
                if row < span.rows:
                    self._unpack(span, row, 1, out[place : place + 1])
                    break
                row -= span.rows
        return out[inverse]

    @timed(THROUGH, "expert")
    def expert(self, index: int) -> PackedTensor:
        """One index of dimension 0, of a weight of three dimensions and more."""
        return self._seen(self.shape[1:], self._spans_of(index, 1))

    def part(self, first: int, count: int) -> torch.Tensor:
        """`count` indices of dimension 0, unpacked."""
        if self.whole is not None or self.order is not None:
            return self.unpack()[first : first + count]
        return self._seen(torch.Size((count, *self.shape[1:])), self._spans_of(first, count)).unpack()

    def _spans_of(self, index: int, count: int) -> tuple[PanelSpan, ...]:
        """The panels of `count` indices of dimension 0."""
        rows = self.numel() // self.shape[0] // self.shape[-1]
        spans, low = [], index * rows
        for span in self.spans:
            first, last = max(low, 0), min(low + count * rows, span.rows)
            if first < last:
                spans.append(_part(span, first, last - first))
            low -= span.rows
        return tuple(spans)

    def _seen(self, shape: torch.Size, spans: tuple[PanelSpan, ...]) -> PackedTensor:
        """These spans of the same memory, in another shape."""
        seen = PackedTensor(shape, self.dtype, self.memory, spans, self.scratch)
        seen.quick = self.quick
        return seen

    def _again(self) -> PackedTensor:
        """The same weight in another tensor: torch wants one of a view."""
        again = PackedTensor(self.shape, self.dtype, self.memory, self.spans, self.scratch, self.whole, self.order)
        again.quick, again.home = self.quick, self.home
        return again

    def _panels(self, span: PanelSpan) -> torch.Tensor:
        return self.memory[span.at : span.at + span.panels * span.panel_bytes].view(span.panels, span.panel_bytes)

    @timed(UNPACK, "unpack")
    def _unpack(self, span: PanelSpan, first: int, rows: int, out: torch.Tensor) -> None:
        part = _part(span, first, rows)
        codec, columns = codec_for(part.codec), out.shape[1]
        if codec.has_rows:
            codec.unpack_rows(self._panels(part), part.skip, rows, columns, out)
            return
        if part.skip == 0 and part.held == part.rows:
            codec.unpack(self._panels(part), rows, columns, out)
            return
        held = torch.empty(part.held, columns, dtype=out.dtype, device=out.device)
        codec.unpack(self._panels(part), part.held, columns, held)
        out.copy_(held[part.skip : part.skip + rows])

    @timed(UNPACK, "product")
    def _product(self, flat: torch.Tensor, span: PanelSpan, out: torch.Tensor) -> bool:
        """Whether the codec multiplied by itself."""
        codec, panels = codec_for(span.codec), self._panels(span)
        if self.quick and codec.linear_quick(flat, panels, span.rows, out):
            return True
        return codec.linear(flat, panels, span.rows, out)

    def _as_one(self) -> _One | None:
        if len(self.spans) != 1 or self.spans[0].skip or self.dim() != 2:
            return None
        if self.whole is not None or self.order is not None:
            return None
        span, codec = self.spans[0], codec_for(self.spans[0].codec)
        if not codec.has_quick:
            return None
        return _One(codec.linear_quick, self._panels(span), span.rows, self.shape[1], self.dtype)

    def _linear_quick(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """What `linear` answers, with as little Python as can be; None where that has to look closer."""
        one = self._one
        if one is None:
            one = self._one = self._as_one()
        if one is None or type(x) is not torch.Tensor or x.dtype is not one.dtype:
            return None
        *some, columns = x.shape
        if columns != one.columns or not x.is_contiguous():
            return None
        out = x.new_empty((*some, one.rows))
        if not one.product(x.view(-1, columns), one.panels, one.rows, out.view(-1, one.rows)):
            return None
        return out if bias is None else out.add_(bias)

    def _multiply(self, x: torch.Tensor, span: PanelSpan, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        columns = self.shape[-1]
        step = block_rows(columns, self.dtype.itemsize, span.codec, span.panel_rows)
        for first in range(0, span.rows, step):
            rows = min(step, span.rows - first)
            block = self.scratch.rows(rows, columns, self.dtype, self.device)
            self._unpack(span, first, rows, block)
            own = None if bias is None else bias[first : first + rows]
            out[..., first : first + rows] = product(x, block.requires_grad_(), own)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and type(args[1]) is PackedTensor and args[1].quick:
            quick = None if torch.is_grad_enabled() else args[1]._linear_quick(args[0], *args[2:])
            if quick is not None:
                return quick
        if kwargs and "out" in kwargs:
            return as_it_is(func, args, kwargs)
        return _way_of(func)(func, args, kwargs or {})

    def _replace(self, data: torch.Tensor) -> None:
        if data is self:
            return
        if self.home is None:
            raise UnsupportedError(
                "a packed weight was given other data while it is in use: do it before the model runs"
            )
        self.home.replace(data)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._again()
        if (
            func is aten.embedding.default
            and isinstance(args[0], PackedTensor)
            and not isinstance(args[1], PackedTensor)
        ):
            return args[0].look_up(args[1])
        if func._schema.is_mutable:
            return write(func, args, kwargs or {}, _unpacked)
        if views(func) and isinstance(args[0], PackedTensor) and args[0].home is not None:
            return args[0]._as_placeholder().viewed(func, args[1:], kwargs or {})
        return func(*tree_map(_unpacked, args), **tree_map(_unpacked, kwargs or {}))

    def _as_placeholder(self) -> DiskTensor:
        """What stands for this weight where a view of it is wanted, which may be written to."""
        placeholder = DiskTensor.computed(lambda: self.unpack(), (), self.shape, self.dtype).on(self.device)
        placeholder.home = self.home
        return placeholder


def _part(span: PanelSpan, first: int, rows: int) -> PanelSpan:
    """`rows` of the wanted rows of a span, from `first` on."""
    if first == 0 and rows == span.rows:
        return span
    begin = (span.skip + first) // span.panel_rows
    stop = -(-(span.skip + first + rows) // span.panel_rows)
    held = min(stop * span.panel_rows, span.held) - begin * span.panel_rows
    skip = span.skip + first - begin * span.panel_rows
    at = span.at + begin * span.panel_bytes
    return PanelSpan(span.codec, at, stop - begin, span.panel_rows, span.panel_bytes, held, skip, rows)


def _unpacked(value: Any) -> Any:
    return value.unpack() if isinstance(value, PackedTensor) else materialize(value)


# -- how a function of torch is computed where a `PackedTensor` is among its arguments


@lru_cache(maxsize=1024)
def _way_of(func: Any) -> Way:
    if func in _WAYS:
        return _WAYS[func]
    if pointed(func):
        return _refuse
    name = getattr(func, "__name__", "")
    if name == "__get__" or func in METADATA or func in KEPT or _mutates(name):
        return as_it_is
    if func in _ANSWERS:
        return _with_panels
    return _as_view if func in SEEN else _with_numbers


def _mutates(name: str) -> bool:
    """Whether a function of torch writes to its first argument, as its name says."""
    return name in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _with_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*tree_map(_unpacked, args), **tree_map(_unpacked, kwargs))


def _as_view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view; it may be written to where the weight has a home."""
    if isinstance(args[0], PackedTensor) and args[0].home is not None:
        return as_it_is(func, args, kwargs)
    return _with_numbers(func, args, kwargs)


def _with_panels(func: Any, args: Any, kwargs: Any) -> Any:
    """What the panels answer; where they cannot, what the numbers do."""
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        answer = _ANSWERS[func](func, args, kwargs)
    if answer is None:
        return _as_view(func, args, kwargs) if func in SEEN else _with_numbers(func, args, kwargs)
    return answer if isinstance(answer, PackedTensor) else refused(answer, asking(args, kwargs), PACKED)


def _set_data(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._replace(args[1]) if isinstance(args[0], PackedTensor) else _with_numbers(func, args, kwargs)


def _refuse(func: Any, args: Any, kwargs: Any) -> Any:
    raise no_storage(func)


def _linear(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    x, weight, bias = linear_arguments(*args, **kwargs)
    if (
        isinstance(weight, PackedTensor)
        and weight.dim() == 2
        and not isinstance(x, PackedTensor)
        and x.dtype == weight.dtype
    ):
        return weight.linear(x, bias)
    return None


def _picked(func: Any, args: Any, kwargs: Any) -> PackedTensor | None:
    packed = _in_order(args, kwargs)
    if packed is None or packed.dim() < 3:
        return None
    number = picked_index(packed, args[1])
    return None if number is None else packed.expert(number)


def _reshaped(func: Any, args: Any, kwargs: Any) -> PackedTensor | None:
    packed = _in_order(args, kwargs)
    if packed is None or isinstance(args[1], torch.dtype):
        return None
    shape = shape_of_view(packed, args[1:])
    return packed._seen(shape, packed.spans) if len(shape) > 1 and shape[-1] == packed.shape[-1] else None


def _in_order(args: Any, kwargs: Any) -> PackedTensor | None:
    """The first of a function's arguments, where it is a weight whose panels hold its rows in order."""
    first = args[0] if args and not kwargs else None
    return first if isinstance(first, PackedTensor) and first.whole is None and first.order is None else None


_WAYS: dict[Any, Way] = {SET_DATA: _set_data}
_ANSWERS: dict[Any, Way] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: as_it_is,  # its operation is answered by the dispatch, with any arguments
    torch.embedding: as_it_is,
    torch.Tensor.__getitem__: _picked,
    torch.Tensor.view: _reshaped,
    torch.Tensor.reshape: _reshaped,
}
