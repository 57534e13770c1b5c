"""Cutting a pass into units: what is moved as one, and in which order a pass needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lamina.plan.layout import Layout, Part, align, lay_out
from lamina.plan.schedule import Call, Cut, Schedule, Weight

ROW_MULTIPLE = 256  # rows of a block: the same kernels then give the same bits as the whole linear


@dataclass(frozen=True)
class Item:
    """What is moved as one, for one step of a pass: parts of the weights of one module call.

    `cached` items are kept in host memory and only cross to the device.
    """

    module: str
    block: int
    parts: tuple[Part, ...]
    layout: Layout
    cached: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its area."""
        return self.layout.nbytes


def cut_up(schedule: Schedule, streaming: Mapping[str, Weight], size: int) -> tuple[tuple[Item, ...], tuple[int, ...]]:
    """Units of at most about `size` bytes, and the order in which a pass needs them.

    A call whose streamed weights fit in `size` becomes one unit, bound when its module is entered and
    released when it is left; a larger one is divided among the calls inside it; one linear that is
    larger than `size` becomes blocks of rows.
    """
    items: list[Item] = []
    index: dict[tuple[str, tuple[str, ...]], range] = {}
    steps: list[int] = []

    def emit(module: str, names: Sequence[str]) -> None:
        key = (module, tuple(names))
        if key not in index:
            blocks = _blocks([streaming[name] for name in names], size)
            index[key] = range(len(items), len(items) + len(blocks))
            items.extend(
                Item(module, block, tuple(p for _, p in parts), lay_out(parts)) for block, parts in enumerate(blocks)
            )
        steps.extend(index[key])

    divisible = _ancestors(schedule.root, schedule.layers | _shared(schedule.root))

    def visit(call: Call) -> None:
        inside = [name for name in call.touched() if name in streaming]
        total = sum(streaming[name].nbytes for name in inside)
        if call.module not in divisible and total <= size:
            if inside:
                emit(call.module, inside)
            return
        own = [name for name in dict.fromkeys(call.touches) if name in streaming]
        if own:
            emit(call.module, own)
        for inner in call.calls:
            visit(inner)

    visit(schedule.root)
    return tuple(items), tuple(steps)


def _shared(root: Call) -> frozenset[str]:
    """Modules with weights that have several callers: each is bound by its own hook, whoever calls it."""
    callers: dict[str, set[str]] = {}
    for call in root.walk():
        for inner in call.calls:
            callers.setdefault(inner.module, set()).add(call.module)
    several = {module for module, by in callers.items() if len(by) > 1}
    return frozenset(call.module for call in root.walk() if call.module in several and call.touched())


def _ancestors(root: Call, layers: frozenset[str]) -> frozenset[str]:
    """Modules that contain one of `layers`: binding one that contains a decoder layer would bind the model."""
    found: set[str] = set()

    def visit(call: Call) -> bool:
        inside = [visit(inner) for inner in call.calls]
        if any(inside):
            found.add(call.module)
        return any(inside) or call.module in layers

    visit(root)
    return frozenset(found)


def _blocks(weights: Sequence[Weight], size: int) -> list[list[tuple[Weight, Part]]]:
    """The weights of one unit as one block; one linear that is too large as several."""
    weight = weights[0]
    total = sum(w.nbytes for w in weights)
    if total <= size or len(weights) > 1 or not weight.by_rows or weight.cut is not Cut.ROWS:
        return [[(w, Part(w.name, 0, w.rows)) for w in weights]]
    rows = max(size // max(weight.nbytes // weight.rows, 1) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    count = math.ceil(weight.rows / rows)
    rows = align(math.ceil(weight.rows / count), ROW_MULTIPLE)  # even blocks read better
    return [[(weight, Part(weight.name, at, min(rows, weight.rows - at)))] for at in range(0, weight.rows, rows)]


def widest_window(root: Call, items: Sequence[Item], steps: Sequence[int]) -> int:
    """Most bytes between the oldest unit still held and the newest one asked for, over a pass."""
    ends = [0]
    for step in steps:
        ends.append(ends[-1] + items[step].nbytes)
    widest = 0
    at = 0
    modules = {item.module for item in items}

    def visit(call: Call, held: int | None) -> None:
        nonlocal widest, at
        if call.module in modules and at < len(steps) and items[steps[at]].module == call.module:
            first = at
            while at < len(steps) and items[steps[at]].module == call.module and items[steps[at]].block == at - first:
                start = held if held is not None else ends[at]
                widest = max(widest, ends[at + 1] - start)
                at += 1
            if at - first == 1:
                held = held if held is not None else ends[first]
        for inner in call.calls:
            visit(inner, held)

    visit(root, None)
    return widest
