"""Mistakes that a real accelerator would not forgive are put back, one by one: the simulation finds each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.judge import steady, traced_once
from helpers.tiny import write_llama
from lamina.stream import device as devices
from lamina.stream import stream as streams
from lamina.stream.device import AcceleratorDevice, Lane
from lamina.stream.direct_io import Area
from simulated.backend import Accelerator, Register
from simulated.loading import assert_same, judged, load, minimum, said

Breaking = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():
        yield


@pytest.fixture(autouse=True)
def cleared(accelerator: Accelerator) -> Iterator[None]:
    """What a mistake left, on purpose, is cleared away before the fixture counts."""
    yield
    gc.collect()
    accelerator.reset()


def never_unregistered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(devices, "_unpin", lambda *_: None)


def never_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Neither at an end nor in the allocator."""
    patch.setattr(AcceleratorDevice, "settle", lambda self: None)
    patch.setattr(devices, "_unpin", lambda *_: None)
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def not_after_what_had_the_memory(patch: pytest.MonkeyPatch) -> None:
    begun = Lane.__init__

    def begin(self: Lane, *arguments: Any) -> None:
        begun(self, *arguments)
        self._last_used = None  # type: ignore[assignment]

    patch.setattr(Lane, "__init__", begin)


def torn_off(patch: pytest.MonkeyPatch) -> None:
    """Host memory is given back while it is copied."""
    patch.setattr(AcceleratorDevice, "settle", lambda self: None)
    unpin = devices._unpin
    patch.setattr(devices, "_unpin", lambda memory, driver, at, settle, owner: unpin(memory, driver, at, int, owner))


def cached_items_are_not_pinned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streams, "_wholes", lambda _: [])


def life(folder: Path, accelerator: Accelerator, register: Register) -> list[str]:
    """A model with items in host memory computes, is planned again, closed and collected: what was wrong meanwhile."""
    write_llama(folder, spread=0.2)
    accelerator.schedule(1.0, 1.0)
    ids, wanted = judged(folder, accelerator)
    least = minimum(folder, accelerator)
    accelerator.driver.reset_counts()
    accelerator.schedule()
    model = load(folder, accelerator, memory=least.memory + (1 << 30), device_memory=least.device_memory)
    assert any(item.cached for item in model.lamina.plan.items)
    wrong = []
    try:
        for _ in range(2):
            assert_same(said(model, ids), wanted)
            model.lamina.engine.replan(model.lamina.plan.budget)
        assert_same(said(model, ids), wanted)
    except AssertionError:
        wrong.append("answers")
    model.lamina.close()
    if accelerator.pins:
        wrong.append("pins")
    if any(register.codes):
        wrong.append("codes")
    del model
    gc.collect()
    accelerator.finish()
    counts = accelerator.counts
    return wrong + [name for name in ("strays", "torn", "pageable_copies") if counts[name]]


def recycled(accelerator: Accelerator) -> list[str]:
    """A lane in memory that a queued computation still writes to: whether its first item arrives whole."""
    accelerator.driver.empty_cache()
    device = AcceleratorDevice(accelerator.device)
    source = Area(1 << 16)
    source.tensor.fill_(7)
    pin = device.pin(source.tensor)
    before = torch.ones(1 << 16, dtype=torch.uint8, device=accelerator.device)
    accelerator.finish()
    accelerator.schedule(copies=1.0)
    before.add_(1)
    address = before.data_ptr()
    del before
    lane = Lane(device, 1 << 16)
    assert lane.tensor.data_ptr() == address, "the allocator gave another block: this proves nothing"
    slot = lane.upload(source.tensor)
    assert slot is not None
    arrived = lane.enter(slot).cpu().unique().tolist() == [7]
    assert pin is not None
    pin.release()
    return [] if arrived else ["first copy"]


def test_without_a_mistake_nothing_is_found(tmp_path: Path, accelerator: Accelerator, register: Register) -> None:
    assert life(tmp_path, accelerator, register) == []
    assert recycled(accelerator) == []


@pytest.mark.parametrize(
    ("mistake", "signs"),
    [
        (never_unregistered, {"pins", "codes"}),
        (never_waited_for, {"strays"}),
        (torn_off, {"torn"}),
        (cached_items_are_not_pinned, {"pageable_copies"}),
    ],
)
def test_a_mistake_is_found(
    mistake: Breaking, signs: set[str], tmp_path: Path, accelerator: Accelerator, register: Register,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mistake(monkeypatch)
    assert signs <= set(life(tmp_path, accelerator, register))


def test_a_first_copy_that_does_not_wait_is_found(
    accelerator: Accelerator, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_after_what_had_the_memory(monkeypatch)
    assert recycled(accelerator) == ["first copy"]
