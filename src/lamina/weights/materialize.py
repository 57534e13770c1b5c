"""From stored bytes to tensors: of those that are in memory already, of what is read now, of what stays.

Nothing here knows of a model or of hooks: a weight is a name in the schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lamina.plan.layout import Item, Layout, Part, Placed, Read, align, lay_out, read_at
from lamina.plan.planner import resident_areas
from lamina.plan.schedule import Convert, Weight
from lamina.progress import Progress
from lamina.stream.direct_io import Area
from lamina.stream.observe import COPY, LAMINA, timed
from lamina.stream.readers import Readers, Ticket
from lamina.tensors.packed import PackedTensor, Scratch
from lamina.weights.describe import Weights

AT_ONCE = 16 << 20  # bytes of a weight that are in host memory beside the place they go to
Finish = Callable[[Placed, torch.Tensor], torch.Tensor]


class Materializer:
    """Makes tensors of the weights of one schedule.

    Args:
        weights: the schedule, with what turns stored bytes into tensors.
        readers: the reader threads, for what is read now.
        device: where the tensors of what is read now end up.
        arrived: (name, tensor) -> the weight, or rows of it, as it should be by now; it may write to the tensor.
        asked: whether the weight of a name takes gradients.
    """

    def __init__(
        self,
        weights: Weights,
        readers: Readers,
        device: torch.device,
        arrived: Callable[[str, torch.Tensor], torch.Tensor],
        asked: Callable[[str], bool],
    ) -> None:
        self._weights, self._readers, self._device = weights, readers, device
        self._arrived, self._asked = arrived, asked
        self._schedule = weights.schedule.weights
        self._scratch = Scratch()

    @timed(LAMINA)
    def finish(self, placed: Placed, memory: torch.Tensor) -> torch.Tensor:
        """The tensor of a part whose stored bytes are in `memory`.

        Args:
            placed: the part, and where its bytes are.
            memory: uint8 of shape (bytes,), with room for the finished part where it is converted.
        """
        weight = self._schedule[placed.part.weight]
        shape = weight.shape if placed.part.count == weight.rows else (placed.part.count, *weight.shape[1:])
        if weight.convert is Convert.UNPACK:
            return self._packed(weight, placed, shape, memory)
        final = memory[placed.at : placed.at + placed.nbytes].view(dtype_of(weight)).view(shape)
        if weight.convert is not Convert.NONE:
            self._convert(weight, memory[placed.stored_at : placed.stored_at + placed.stored_nbytes], final)
        final = self._arrived(weight.name, final).data  # counts from now on what is written to it
        # torch picks kernels by this flag even under no_grad (matmul folds): plain transformers has it set
        return final.requires_grad_(self._asked(weight.name) and is_differentiable(final))

    def stored(self, item: Item) -> torch.Tensor:
        """The stored bytes of an item, read now: uint8 of shape (item.nbytes,)."""
        area = Area(item.nbytes)
        self._readers.read(item.layout.reads, area)
        return area.tensor

    def stored_together(self, items: Mapping[int, Item]) -> dict[int, torch.Tensor]:
        """The stored bytes of several items, read now, all in one memory: uint8 of shape (item.nbytes,) each."""
        places = dict(
            zip(items, itertools.accumulate((align(i.nbytes) for i in items.values()), initial=0), strict=False)
        )
        area = Area(sum(align(item.nbytes) for item in items.values()))
        for ticket in [self._readers.submit(item.layout.reads, area, places[key]) for key, item in items.items()]:
            self._readers.wait(ticket)
        return {key: area.tensor[places[key] : places[key] + item.nbytes] for key, item in items.items()}

    @timed(LAMINA)
    def block(self, item: Item) -> torch.Tensor:
        """The tensor of an item with one part, read now."""
        return self.finish(item.layout.placed[0], self.stored(item)).to(self._device)

    @timed(LAMINA)
    def read(self, name: str) -> torch.Tensor:
        """A weight, whole, read now."""
        return self.rows(name, 0, self._schedule[name].rows)

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` indices of dimension 0 of a weight, from `first` on, read now."""
        layout = lay_out([(self._schedule[name], Part(name, first, count))])
        area = Area(layout.nbytes)
        self._readers.read(layout.reads, area)
        tensor = self.finish(layout.placed[0], area.tensor)
        tensor = tensor.unpack() if isinstance(tensor, PackedTensor) else tensor
        return tensor.detach().to(self._device)

    @timed(LAMINA)
    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table, read now.

        Args:
            ids: integer tensor of any shape.

        Returns:
            Tensor of shape (*ids.shape, columns).
        """
        weight = self._schedule[name]
        unique, inverse = torch.unique(ids.to("cpu"), return_inverse=True)
        if weight.convert is Convert.UNPACK:
            return self._gather_packed(weight, unique.tolist())[inverse].to(self._device)
        row = weight.stored_nbytes // weight.rows
        area = Area(len(unique) * row)
        reads: list[Read] = []
        for place, index in enumerate(unique.tolist()):
            reads.extend(read_at(piece, place * row) for piece in weight.pieces_of_rows(index, 1))
        self._readers.read(reads, area)
        stored = area.tensor[: len(unique) * row].view(self._stored_dtype(weight)).view(len(unique), weight.shape[1])
        rows = self._arrived(name, stored.to(self._device, dtype_of(weight)))
        return rows[inverse.to(self._device)]

    def _gather_packed(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows of a table that is stored in panels; each of their panels is read for itself."""
        order = self._weights.orders.get(weight.name)
        rows = rows if order is None else order[rows].tolist()
        ranges = [weight.stored_range(row, 1) for row in rows]
        places = list(itertools.accumulate((end - begin for begin, end in ranges), initial=0))
        area = Area(places[-1])
        reads: list[Read] = []
        for row, at in zip(rows, places, strict=False):
            reads.extend(read_at(piece, at) for piece in weight.pieces_of_rows(row, 1))
        self._readers.read(reads, area)
        columns, dtype = weight.shape[1], dtype_of(weight)
        out = torch.empty(len(rows), columns, dtype=dtype)
        for place, row in enumerate(rows):
            memory = area.tensor[places[place] : places[place + 1]]
            out[place] = PackedTensor((1, columns), dtype, memory, weight.spans(row, 1), self._scratch).unpack()[0]
        return out

    @timed(COPY)
    def _convert(self, weight: Weight, stored: torch.Tensor, final: torch.Tensor) -> None:
        if weight.convert is Convert.CAST:
            final.copy_(stored.view(self._stored_dtype(weight)).view(final.shape))
        else:
            final.copy_(self._weights.replays[weight.name](stored))

    def _packed(self, weight: Weight, placed: Placed, shape: tuple[int, ...], memory: torch.Tensor) -> PackedTensor:
        part, dtype = placed.part, dtype_of(weight)
        stored = memory[placed.stored_at : placed.stored_at + placed.stored_nbytes]
        whole = self._weights.replays.get(weight.name)
        order = self._weights.orders.get(weight.name) if part.count == weight.rows else None
        return PackedTensor(shape, dtype, stored, weight.spans(part.first, part.count), self._scratch, whole, order)

    def _stored_dtype(self, weight: Weight) -> torch.dtype:
        return self._weights.stored_dtypes.get(weight.name, dtype_of(weight))


def dtype_of(weight: Weight) -> torch.dtype:
    """The dtype that a weight has in the model."""
    dtype: torch.dtype = getattr(torch, weight.dtype)
    return dtype


def is_differentiable(tensor: torch.Tensor) -> bool:
    """Whether a tensor of this dtype can take gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def load_residents(
    weights: Sequence[Weight],
    readers: Readers,
    finish: Finish,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Read weights that stay.

    Args:
        weights: what to read.
        readers: who reads it.
        finish: gives the tensor of a part whose stored bytes are in memory.
        device: where the tensors end up.
        progress: called with ("load", bytes done, bytes in all).

    Returns:
        The tensors by weight name.
    """
    total = sum(weight.stored_nbytes for weight in weights)
    before = readers.bytes_read

    def tell() -> None:
        if progress is not None:
            progress("load", min(readers.bytes_read - before, total), total)

    tensors: dict[str, torch.Tensor] = {}
    waiting: list[tuple[Layout, Area, Ticket]] = []
    for group in resident_areas(weights):
        if group[0].converted or device.type != "cpu":
            for weight in group:
                tensors[weight.name] = _in_blocks(weight, readers, finish, device, tell)
            continue
        layout = lay_out([(w, Part(w.name, 0, w.rows)) for w in group])
        area = Area(layout.nbytes)
        waiting.append((layout, area, readers.submit(layout.reads, area)))
    tensors.update(_arrived(waiting, readers, finish, tell))
    tell()
    return tensors


def _arrived(
    waiting: list[tuple[Layout, Area, Ticket]], readers: Readers, finish: Finish, tell: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """The tensors of areas that are being read, once they are."""
    tensors = {}
    for layout, area, ticket in waiting:
        _wait(readers, ticket, tell)
        for placed in layout.placed:
            tensor = finish(placed, area.tensor)
            tensors[placed.part.weight] = tensor if isinstance(tensor, PackedTensor) else tensor.detach()
    return tensors


def _in_blocks(
    weight: Weight, readers: Readers, finish: Finish, device: torch.device, tell: Callable[[], None]
) -> torch.Tensor:
    """A weight whose bytes only pass through host memory, to be converted or on their way to a device: by rows."""
    if weight.convert is Convert.UNPACK:
        layout = lay_out([(weight, Part(weight.name, 0, weight.rows))])
        area = Area(layout.nbytes)
        _wait(readers, readers.submit(layout.reads, area), tell)
        return finish(layout.placed[0], area.tensor.to(device))
    rows = weight.rows
    if weight.convert is not Convert.REPLAY and weight.shape:
        rows = max(min(rows, AT_ONCE * weight.rows // max(weight.stored_nbytes, 1)), 1)
    out = None
    for layout, area, ticket in _one_ahead(_begun(weight, readers, rows)):
        _wait(readers, ticket, tell)
        block = finish(layout.placed[0], area.tensor).detach()
        if rows >= weight.rows:
            return block.to(device, copy=True)
        if out is None:
            out = torch.empty(weight.shape, dtype=block.dtype, device=device)
        first = layout.placed[0].part.first
        out[first : first + block.shape[0]] = block
    assert out is not None
    return out


Begun = tuple[Layout, Area, Ticket]


def _begun(weight: Weight, readers: Readers, rows: int) -> Iterator[Begun]:
    """Reads of `rows` rows of a weight after the other, each begun when it is asked for."""
    for first in range(0, max(weight.rows, 1), max(rows, 1)):
        layout = lay_out([(weight, Part(weight.name, first, min(rows, weight.rows - first)))])
        area = Area(layout.nbytes)
        yield layout, area, readers.submit(layout.reads, area)


def _one_ahead(begun: Iterator[Begun]) -> Iterator[Begun]:
    """The same, the next one under way while one is converted or copied."""
    this = next(begun, None)
    while this is not None:
        following = next(begun, None)
        yield this
        this = following


def _wait(readers: Readers, ticket: Ticket, tell: Callable[[], None]) -> None:
    """Wait for a ticket, with a sign of life."""
    while True:
        with readers.changed:
            if not ticket.left or readers.closed:
                break
            readers.changed.wait(0.1)
        tell()
    readers.wait(ticket)
