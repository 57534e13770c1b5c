"""The pass as data: which bytes hold which rows, and what a call touches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.schedules import Checkpoint, llama
from lamina.plan.layout import Part
from lamina.plan.schedule import Call


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 7), pieces=st.integers(1, 6), data=st.data())
def test_pieces_of_rows_hold_exactly_those_rows(rows: int, columns: int, pieces: int, data: st.DataObject) -> None:
    disk = Checkpoint(data.draw(st.integers(0, 1000)))
    disk.add("w", rows, columns, pieces=pieces, gap=3)
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(0, rows - first))
    weight = disk.weights["w"]
    found = bytearray(count * columns * 2)
    covered = 0
    for piece in weight.pieces_of_rows(first, count):
        extent = piece.extent
        found[piece.at : piece.at + extent.length] = disk.content(extent.file)[extent.offset :][: extent.length]
        covered += extent.length
    assert covered == len(found)
    assert found == disk.stored(Part("w", first, count))


def test_a_scalar_has_one_row() -> None:
    disk = Checkpoint()
    disk.add("scale")
    weight = disk.weights["scale"]
    assert (weight.rows, weight.elements, weight.nbytes) == (1, 1, 2)
    assert weight.pieces_of_rows(0, 1) == weight.pieces


def test_touched_is_in_order_of_first_touch_and_without_repeats() -> None:
    inner = Call("inner", ("b", "a"))
    root = Call("", ("a",), (inner, Call("other", ("c", "b")), inner))
    assert list(root.touched()) == ["a", "b", "c"]
    assert [call.module for call in root.walk()] == ["", "inner", "other", "inner"]


def test_the_bytes_of_a_schedule_are_those_on_disk() -> None:
    schedule, disk = llama(3, 64, 96, 32, 128, stored=4)
    assert schedule.nbytes == sum(disk.sizes.values()) == sum(w.stored_nbytes for w in disk.weights.values())
