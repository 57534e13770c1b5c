"""The simulated accelerator itself: that it is late, separate and unforgiving in the ways that a real one is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina.stream.direct_io import Area
from simulated.backend import Accelerator, Register

PAGE = 4096


@pytest.fixture(autouse=True)
def nothing_left(accelerator: Accelerator) -> None:
    """Every test here ends with an empty accelerator as well."""


def pinned(accelerator: Accelerator, nbytes: int = PAGE, value: int = 1) -> tuple[Area, Register]:
    area = Area(nbytes)
    area.tensor.fill_(value)
    register = Register(accelerator)
    assert register.register(area.address, area.nbytes) == 0
    return area, register


def test_computations_are_late_and_right(accelerator: Accelerator) -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    on_device = rows.to(accelerator.device)
    result = torch.cat([on_device @ on_device.T, on_device.cumsum(1)], 1)[1:, ::2].softmax(-1).argmax(-1)
    assert accelerator.pending
    assert torch.equal(result.cpu(), torch.cat([rows @ rows.T, rows.cumsum(1)], 1)[1:, ::2].softmax(-1).argmax(-1))
    assert not accelerator.pending
    assert accelerator.counts["early_kernels"] == 0


def test_a_result_of_unknown_shape_is_waited_for(accelerator: Accelerator) -> None:
    numbers = torch.arange(6, device=accelerator.device)
    assert numbers[numbers % 2 == 0].tolist() == [0, 2, 4]
    assert int(numbers.sum()) == 15
    assert accelerator.counts["early_kernels"] > 0


@pytest.mark.parametrize("what", ["read", "write"])
def test_the_host_cannot_touch_device_memory(accelerator: Accelerator, what: str) -> None:
    touch = "string_at(at, 1)" if what == "read" else "memset(at, 0, 1)"
    code = (
        "import ctypes, torch\nfrom simulated.backend import accelerator\n"
        f"at = torch.zeros(8, device=accelerator().device).data_ptr()\nprint('there', flush=True)\nctypes.{touch}"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout == "there\n" and ran.returncode == -11, ran.stderr


def test_a_copy_from_pinned_memory_reads_late(accelerator: Accelerator) -> None:
    area, register = pinned(accelerator)
    copying = torch.Stream(device=accelerator.device)
    target = torch.zeros(PAGE, dtype=torch.uint8, device=accelerator.device)
    accelerator.finish()
    with copying:
        target.copy_(area.tensor, non_blocking=True)
    done = torch.Event(device=accelerator.device)
    done.record(copying)
    assert not done.query()
    area.tensor.fill_(2)
    done.synchronize()
    assert done.query() and target.cpu().unique().tolist() == [2]
    assert accelerator.counts["pinned_copies"] == 1
    register.unregister(area.address)


def test_a_copy_from_pageable_memory_reads_at_once_and_writes_late(accelerator: Accelerator) -> None:
    source = torch.ones(PAGE, dtype=torch.uint8)
    target = torch.zeros(PAGE, dtype=torch.uint8, device=accelerator.device)
    accelerator.finish()
    copying = torch.Stream(device=accelerator.device)
    with copying:
        target.copy_(source, non_blocking=True)
    source.fill_(2)
    assert target.cpu().unique().tolist() == [0], "the default stream does not wait for another"
    copying.synchronize()
    assert target.cpu().unique().tolist() == [1]
    assert accelerator.counts["pageable_copies"] == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_are_ordered_by_events_alone(accelerator: Accelerator, ordered: bool) -> None:
    area, register = pinned(accelerator)
    copying = torch.Stream(device=accelerator.device)
    target = torch.zeros(PAGE, dtype=torch.uint8, device=accelerator.device)
    accelerator.finish()
    with copying:
        target.copy_(area.tensor, non_blocking=True)
    if ordered:
        torch.accelerator.current_stream(accelerator.device).wait_event(copying.record_event())
    assert int(target.sum()) == (PAGE if ordered else 0)
    copying.synchronize()
    register.unregister(area.address)


def test_late_computations_see_what_was_copied_over_their_memory_too_early(accelerator: Accelerator) -> None:
    area, register = pinned(accelerator, value=7)
    copying = torch.Stream(device=accelerator.device)
    weights = torch.ones(PAGE, dtype=torch.uint8, device=accelerator.device)
    accelerator.finish()
    accelerator.schedule(copies=1.0)
    total = weights.sum()
    with copying:
        weights.copy_(area.tensor, non_blocking=True)
    assert int(total) == 7 * PAGE
    register.unregister(area.address)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_freed_block_is_given_out_at_once_unless_a_stream_was_recorded(
    accelerator: Accelerator, recorded: bool
) -> None:
    area, register = pinned(accelerator, value=3)
    copying = torch.Stream(device=accelerator.device)
    target = torch.zeros(PAGE, dtype=torch.uint8, device=accelerator.device)
    if recorded:
        target.record_stream(copying)
    with copying:
        target.copy_(area.tensor, non_blocking=True)
    address = target.data_ptr()
    del target
    other = torch.zeros(PAGE, dtype=torch.uint8, device=accelerator.device)
    assert (other.data_ptr() == address) is not recorded
    accelerator.schedule()
    torch.accelerator.current_stream(accelerator.device).synchronize()
    copying.synchronize()
    assert other.cpu().unique().tolist() == [0 if recorded else 3]
    assert accelerator.counts["strays"] == (0 if recorded else 1)
    accelerator.driver.reset_counts()
    register.unregister(area.address)


def test_the_register_refuses_as_the_driver_does(accelerator: Accelerator) -> None:
    area, register = pinned(accelerator, 4 * PAGE)
    assert register.register(area.address, PAGE) == 712
    assert register.register(area.address + 3 * PAGE, 2 * PAGE) in (1, 712)
    assert register.register(0x1000, PAGE) == 1
    assert register.unregister(area.address + PAGE) == 713
    assert area.tensor.unique().tolist() == [1], "pinning keeps what is there"
    assert area.tensor.is_pinned() is False  # torch asks about CUDA where no device is named
    assert register.unregister(area.address) == 0
    assert register.unregister(area.address) == 713


def test_memory_that_was_unmapped_while_registered_gives_its_old_bytes(accelerator: Accelerator) -> None:
    area, register = pinned(accelerator, 64 * PAGE, value=1)
    address = area.address
    del area
    again = Area(64 * PAGE)
    assert again.address == address, "the system gave another address: this test proves nothing"
    again.tensor.fill_(2)
    assert register.register(again.address, again.nbytes) == 712
    target = torch.empty(PAGE, dtype=torch.uint8, device=accelerator.device)
    target.copy_(again.tensor[:PAGE], non_blocking=True)
    assert target.cpu().unique().tolist() == [1]
    register.unregister(address)


def test_a_copy_may_not_reach_out_of_the_range_that_it_begins_in(accelerator: Accelerator) -> None:
    area = Area(2 * PAGE)
    register = Register(accelerator)
    assert register.register(area.address, PAGE) == 0
    assert register.register(area.address + PAGE, PAGE) == 0
    target = torch.empty(2 * PAGE, dtype=torch.uint8, device=accelerator.device)
    with pytest.raises(RuntimeError, match="beyond the registered range"):
        target.copy_(area.tensor, non_blocking=True)
    for at in (area.address, area.address + PAGE):
        register.unregister(at)


def test_there_is_an_end_to_device_memory(accelerator: Accelerator) -> None:
    accelerator.driver.set_capacity(1 << 20)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 20, dtype=torch.uint8, device=accelerator.device)
    finally:
        accelerator.driver.set_capacity(4 << 30)
