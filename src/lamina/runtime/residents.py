"""Reading the resident weights, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina.plan.layout import Layout, Part, Placed, lay_out
from lamina.plan.planner import resident_areas
from lamina.plan.schedule import Convert, Weight
from lamina.progress import Progress
from lamina.stream.memory import Area
from lamina.stream.readers import Readers, Ticket
from lamina.tensors.packed import Encoded

AT_ONCE = 16 << 20  # bytes of a weight that are in host memory beside the place they go to

Finish = Callable[[Placed, torch.Tensor], torch.Tensor]


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
        progress: told ("load", bytes done, bytes in all) as it goes.

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
            tensors[placed.part.weight] = tensor if isinstance(tensor, Encoded) else tensor.detach()
    return tensors


def _in_blocks(
    weight: Weight, readers: Readers, finish: Finish, device: torch.device, tell: Callable[[], None]
) -> torch.Tensor:
    """A weight whose bytes only pass through host memory, to be converted or on their way to a device: by rows."""
    if weight.convert is Convert.DECODE:
        layout = lay_out([(weight, Part(weight.name, 0, weight.rows))])
        area = Area(layout.nbytes)
        _wait(readers, readers.submit(layout.reads, area), tell)
        return finish(layout.placed[0], area.tensor.to(device))
    rows = weight.rows
    if weight.convert is not Convert.REPLAY and weight.shape:
        rows = max(min(rows, AT_ONCE * weight.rows // max(weight.stored_nbytes, 1)), 1)
    out = None
    for first in range(0, max(weight.rows, 1), max(rows, 1)):
        layout = lay_out([(weight, Part(weight.name, first, min(rows, weight.rows - first)))])
        area = Area(layout.nbytes)
        _wait(readers, readers.submit(layout.reads, area), tell)
        block = finish(layout.placed[0], area.tensor).detach()
        if rows >= weight.rows:
            return block.to(device, copy=True)
        if out is None:
            out = torch.empty(weight.shape, dtype=block.dtype, device=device)
        out[first : first + block.shape[0]] = block
    assert out is not None
    return out


def _wait(readers: Readers, ticket: Ticket, tell: Callable[[], None]) -> None:
    """Wait for a ticket, with a sign of life."""
    while True:
        with readers.changed:
            if not ticket.left or readers.closed:
                break
            readers.changed.wait(0.1)
        tell()
    readers.wait(ticket)
