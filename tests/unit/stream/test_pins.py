"""Host memory that a driver has registered is given back before it is unmapped, and nothing is copied from it then."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field

import pytest
import torch

from helpers.fake_device import FakeDevice
from helpers.schedules import llama, streamed
from lamina.stream import device
from lamina.stream.device import Pin, _pieces
from lamina.stream.direct_io import Area
from lamina.stream.readers import Readers
from lamina.stream.stream import Stream
from unit.stream.test_device import Disk, cached_items

ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered


@dataclass
class Driver:
    """A register like CUDA's: what overlaps is refused, and so is everything from the `most`th on."""

    most: int = 1 << 30
    held: dict[int, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def register(self, address: int, nbytes: int) -> int:
        if any(address < at + size and at < address + nbytes for at, size in self.held.items()):
            return ALREADY
        if len(self.held) >= self.most:
            return 2
        self.held[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        self.said.append("unregister")
        return 0 if self.held.pop(address, None) else 713

    def settle(self) -> None:
        self.said.append("settle")


@pytest.fixture
def driver() -> Driver:
    return Driver()


def pinned(driver: Driver, memory: torch.Tensor) -> Pin:
    return Pin(memory, driver, driver.settle)


def test_memory_is_registered_and_given_back_once(driver: Driver) -> None:
    area = Area(10_000)
    pin = pinned(driver, area.tensor)
    assert driver.held == {area.address: area.nbytes} and pin.fault is None
    pin.release()
    pin.release()
    assert not driver.held and driver.said == ["settle", "unregister"]


def test_what_is_collected_is_given_back_before_its_memory_is(driver: Driver) -> None:
    area = Area(10_000)
    pin = pinned(driver, area.tensor)
    del area
    gc.collect()
    assert driver.held, "the pin keeps the memory"
    del pin
    gc.collect()
    assert not driver.held and driver.said == ["settle", "unregister"]


def test_a_driver_that_refuses_is_heard(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PIN_CHUNK", 4096)
    driver.most = 2
    area = Area(5 * 4096)
    pin = pinned(driver, area.tensor)
    assert list(driver.held) == [area.address, area.address + 4096], "what was registered before stays"
    assert pin.fault == (
        f"{3 * 4096} bytes of host memory could not be pinned (the driver says 2): copies of them to the device "
        "are slower"
    )
    second = pinned(driver, area.tensor)
    assert second.fault is not None and f"says {ALREADY}" in second.fault
    second.release()
    assert len(driver.held) == 2, "what another pin holds is not given back"
    pin.release()
    assert not driver.held


def test_a_forked_child_leaves_the_driver_alone(driver: Driver) -> None:
    pin = pinned(driver, Area(4096).tensor)
    child = os.fork()
    if not child:
        pin.release()
        os._exit(len(driver.said))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pin.release()


def test_a_copy_never_reaches_from_one_registered_range_into_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PIN_CHUNK", 4096)
    memory = Area(5 * 4096).tensor
    assert _pieces(memory[:4096]) == [(0, 4096)]
    assert _pieces(memory[100:4096]) == [(0, 3996)]
    assert _pieces(memory[4000:9000]) == [(0, 96), (96, 4192), (4192, 5000)]
    assert _pieces(memory[8192:8192]) == [(0, 0)]


class Pinning(FakeDevice):
    """A device with a driver."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(0, 0.0, "compute")
        self.driver = driver

    def pin(self, tensor: torch.Tensor) -> Pin:
        return Pin(tensor, self.driver, self.settle)


@pytest.mark.parametrize("collected", [False, True])
def test_a_stream_gives_everything_back(driver: Driver, collected: bool) -> None:
    """Closed or collected: no copy is under way, nothing is registered; and it may be closed twice."""
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan, fake = streamed(schedule, 20_000, 0), Pinning(driver)
    readers = Readers(3, chunk=8192, opener=Disk(checkpoint, 0).open)
    try:
        stream = Stream(plan, readers, fake, cached_items(plan, checkpoint, 0.0, fake.random))
        stream.begin_pass()
        readers.settle()
        stream.pump()
        assert fake.copies and driver.held
        if collected:
            del stream
            gc.collect()
        else:
            stream.close()
            stream.close()
        assert not fake.copies and not driver.held
    finally:
        readers.close()


def test_host_copies_of_items_are_registered_once_for_all(driver: Driver) -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = streamed(schedule, 20_000, 0)
    sizes = [item.nbytes for item in plan.items]
    arena = Area(sum(sizes))
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    cached = {index: arena.tensor[ends[index] : ends[index + 1]] for index in range(len(sizes))}
    readers = Readers(1, opener=Disk(checkpoint, 0).open)
    try:
        stream = Stream(plan, readers, Pinning(driver), cached)
        assert arena.address in driver.held and len(driver.held) == 2
        stream.close()
        assert not driver.held
    finally:
        readers.close()
