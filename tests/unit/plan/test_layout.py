"""Where bytes go: the reads of a layout, carried out one by one, give exactly the weights."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.schedules import Checkpoint
from lamina.plan.layout import ALIGNMENT, GAP, PACKING, Layout, Part, align, lay_out
from lamina.plan.schedule import Convert, Cut


def carry_out(layout: Layout, disk: Checkpoint) -> bytearray:
    """The area after its reads, each one checked for what a direct read demands."""
    area = bytearray(b"\xa5" * layout.nbytes)
    for read in layout.reads:
        assert 0 < read.needed <= read.length
        assert read.at + read.length <= layout.nbytes
        if read.aligned:
            assert not (read.offset % ALIGNMENT or read.length % ALIGNMENT or read.at % ALIGNMENT)
        content = disk.content(read.file)
        assert read.offset + read.needed <= len(content)
        got = content[read.offset : read.offset + read.length]
        assert len(got) >= read.needed
        area[read.at : read.at + len(got)] = got
    return area


def disjoint(spans: list[tuple[int, int]]) -> bool:
    spans = sorted(span for span in spans if span[0] < span[1])
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def check(layout: Layout, disk: Checkpoint) -> None:
    area = carry_out(layout, disk)
    assert layout.nbytes % ALIGNMENT == 0
    assert disjoint([(read.at, read.at + read.length) for read in layout.reads])
    finals, stored = [], []
    for placed in layout.placed:
        weight = disk.weights[placed.part.weight]
        want = disk.stored(placed.part)
        assert placed.stored_nbytes == len(want)
        assert bytes(area[placed.stored_at : placed.stored_at + placed.stored_nbytes]) == want, placed
        assert placed.nbytes == weight.nbytes // weight.rows * placed.part.count
        assert placed.at + placed.nbytes <= layout.nbytes
        assert placed.at % weight.itemsize == 0
        assert placed.stored_at % weight.stored_itemsize == 0
        stored.append((placed.stored_at, placed.stored_at + placed.stored_nbytes))
        if weight.convert is Convert.NONE:
            assert (placed.at, placed.nbytes) == (placed.stored_at, placed.stored_nbytes)
        else:
            finals.append((placed.at, placed.at + placed.nbytes))
            assert placed.at % PACKING == 0
    assert disjoint(stored + finals)
    assert disjoint([(read.at, read.at + read.needed) for read in layout.reads] + finals)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 12))
def test_reads_carried_out_give_every_part(seed: int, count: int) -> None:
    rng = random.Random(seed)
    disk = Checkpoint(seed)
    for i in range(count):
        itemsize = rng.choice((2, 4))
        disk.add(f"w{i}", rng.randint(1, 600), rng.randint(1, 9), file=rng.choice("ab"), itemsize=itemsize,
                 stored=rng.choice((itemsize, itemsize, 6 - itemsize)), gap=rng.choice((0, 1, 64, 5000, 70_000)),
                 pieces=rng.choice((1, 1, 1, 2, 6)), odd=rng.random() < 0.2, cut=Cut.ROWS)  # fmt: skip
    parts = []
    for weight in disk.weights.values():
        first = rng.choice((0, 0, rng.randrange(weight.rows)))
        count = rng.choice((weight.rows - first, rng.randint(1, weight.rows - first)))
        parts.append((weight, Part(weight.name, first, count)))
    rng.shuffle(parts)
    layout = lay_out(parts)
    assert [placed.part for placed in layout.placed] == [part for _, part in parts]
    check(layout, disk)


def test_neighbours_in_a_file_become_one_read() -> None:
    disk = Checkpoint()
    for i in range(5):
        disk.add(f"w{i}", 3000, gap=GAP if i else 100)
    layout = lay_out([(w, Part(w.name, 0, 3000)) for w in disk.weights.values()])
    assert len(layout.reads) == 1
    check(layout, disk)


def test_a_wide_hole_is_not_read() -> None:
    disk = Checkpoint()
    disk.add("left", 3000)
    disk.add("right", 3000, gap=GAP + 3 * ALIGNMENT)
    layout = lay_out([(w, Part(w.name, 0, 3000)) for w in disk.weights.values()])
    assert len(layout.reads) == 2
    assert layout.read_bytes < GAP
    check(layout, disk)


def test_a_file_s_last_bytes_are_read_without_asking_for_more() -> None:
    disk = Checkpoint()
    disk.add("head", 10)
    disk.add("tail", 5000)
    weight = disk.weights["tail"]
    (read,) = lay_out([(weight, Part("tail", 0, 5000))]).reads
    assert read.offset + read.needed == disk.sizes["a"] < read.offset + read.length


def test_rows_of_a_weight_in_one_run_are_read_in_place() -> None:
    disk = Checkpoint()
    disk.add("norm", 7)
    disk.add("w", 512, 64, cut=Cut.ROWS)
    weight = disk.weights["w"]
    layouts = [lay_out([(weight, Part("w", first, 128))]) for first in range(0, 512, 128)]
    for layout in layouts:
        check(layout, disk)
        (read,) = layout.reads
        assert read.aligned and layout.nbytes <= 128 * 128 + 2 * ALIGNMENT


def test_bytes_at_an_odd_offset_are_moved_to_an_even_place() -> None:
    disk = Checkpoint()
    disk.add("byte", 1, itemsize=2, stored=2)
    disk.sizes["a"] = 3
    disk.add("w", 100, odd=True)
    weight = disk.weights["w"]
    assert weight.pieces[0].extent.offset % 2
    layout = lay_out([(weight, Part("w", 0, 100))])
    assert not layout.reads[0].aligned
    check(layout, disk)


def test_two_names_for_the_same_bytes_are_read_once() -> None:
    disk = Checkpoint()
    disk.add("w", 4000)
    weight = disk.weights["w"]
    layout = lay_out([(weight, Part("w", 0, 4000)), (weight, Part("w", 1000, 500))])
    assert len(layout.reads) == 1
    area = carry_out(layout, disk)
    for placed in layout.placed:
        assert area[placed.stored_at :][: placed.stored_nbytes] == disk.stored(placed.part)


def test_an_empty_layout() -> None:
    layout = lay_out([])
    assert (layout.nbytes, layout.reads, layout.placed, layout.read_bytes) == (0, (), (), 0)


@pytest.mark.parametrize(("value", "aligned"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_align_rounds_up(value: int, aligned: int) -> None:
    assert align(value) == aligned
