"""Where the model computes, reduced to what the stream must know: copies and events.

On the processor weights are computed on where they were read. On an accelerator they are copied on a
stream of their own, and two events order the copy against the computation. `Lane` holds that order, once,
for every device: a slot is copied into only after the computation that used it before is done, computed on
only after its copy is done, and the host bytes are read over only after their copy is done.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lamina.stream.observe import COPY, timed
from lamina.stream.ring import Ring


class Event(Protocol):
    """A point in a device's queue of work."""

    def done(self) -> bool:
        """Whether the device has passed it."""

    def wait(self) -> None:
        """Block the calling thread until the device has passed it."""


class Device(Protocol):
    """What a device must be able to do. Copies and computations run in two queues, in order within each."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """uint8 of shape (nbytes,) on the device."""

    fallbacks: list[str]

    def pin(self, tensor: torch.Tensor) -> Pin | None:
        """Make host memory fast to copy from, for as long as what is returned; None where the device cannot."""

    def settle(self) -> None:
        """Block the calling thread until every copy that was queued is done."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """Queue a copy that begins after `after`; the event is passed when it is done."""

    def compute_after(self, event: Event) -> None:
        """Whatever is computed from now on begins after `event`."""

    def computed(self) -> Event:
        """An event that is passed when everything queued for computation until now is done."""


@dataclass(eq=False)
class Slot:
    """Device memory of one item: where, and when its copy is done."""

    at: int
    nbytes: int
    copied: Event
    released: bool = False


class Lane:
    """Device slots, first in, first out, over one fixed run of device memory."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.tensor = device.memory(nbytes)
        self._ring = Ring(nbytes)
        self._slots: deque[Slot] = deque()
        # what had this memory before may still be computed with
        self._last_used: Event = device.computed()

    @timed(COPY)
    def upload(self, source: torch.Tensor) -> Slot | None:
        """Queue the copy of an item to the device; None while its slots are all in use.

        Args:
            source: host memory, uint8 of shape (nbytes,), left alone until the slot's `copied` is done.
        """
        start = self._ring.take(source.numel())
        if start is None:
            return None
        copied = self.device.copy(self.tensor[start : start + source.numel()], source, self._last_used)
        slot = Slot(start, source.numel(), copied)
        self._slots.append(slot)
        return slot

    @timed(COPY)
    def enter(self, slot: Slot) -> torch.Tensor:
        """The slot's memory, for computations queued from now on."""
        self.device.compute_after(slot.copied)
        return self.tensor[slot.at : slot.at + slot.nbytes]

    @timed(COPY)
    def leave(self, slot: Slot) -> None:
        """Every computation that needs the slot has been queued, or none ever will be."""
        slot.released = True
        if not self._slots or not self._slots[0].released:
            return
        # now, not when each was left: one that was entered early and left late holds up those behind it
        self._last_used = self.device.computed()
        while self._slots and self._slots[0].released:
            self._slots.popleft()
            self._ring.give_back()

    def clear(self) -> None:
        """Take every slot back once its copy is done; no computation that needs one will be queued any more."""
        self.device.settle()
        self._last_used = self.device.computed()
        self._slots.clear()
        self._ring.clear()


class Registrar(Protocol):
    """A driver's register of page-locked ("pinned") host memory. Both give the driver's code; 0 is success."""

    def register(self, address: int, nbytes: int) -> int:
        """Page-lock memory, so that the device reads it without the host's help."""

    def unregister(self, address: int) -> int:
        """Undo it; needed before the memory is unmapped, else what is mapped there next is taken for the old one."""


class _Cudart:
    """CUDA's and ROCm's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, nbytes: int) -> int:
        cudart: Any = torch.cuda.cudart  # has no types
        with torch.cuda.device(self._device):
            code = int(cudart().cudaHostRegister(address, nbytes, 0))
            if code:
                with contextlib.suppress(
                    RuntimeError
                ):  # the driver keeps the error, and the next kernel would raise it
                    torch.zeros(1, device=self._device)
        return code

    def unregister(self, address: int) -> int:
        cudart: Any = torch.cuda.cudart
        with torch.cuda.device(self._device):
            return int(cudart().cudaHostUnregister(address))


def registrar(device: torch.device) -> Registrar | None:
    """The register of a device's driver; None where there is none, and every copy goes through the driver's buffers."""
    return _Cudart(device) if device.type == "cuda" else None


PIN_CHUNK = 1 << 30  # bytes that are registered at once: where one fails, those before it stay


class Pin:
    """Host memory that a device's driver has registered. The memory lives as long as it is.

    Args:
        memory: uint8 of one dimension.
        driver: registers it.
        settle: waits until nothing is copied from it any more.

    Attributes:
        fault: why not all of it is registered; None where all is.
    """

    def __init__(self, memory: torch.Tensor, driver: Registrar, settle: Callable[[], None]) -> None:
        self.fault: str | None = None
        addresses: list[int] = []
        start, nbytes = memory.data_ptr(), memory.numel()
        for at in range(start, start + nbytes, PIN_CHUNK):
            if code := driver.register(at, min(PIN_CHUNK, start + nbytes - at)):
                self.fault = (
                    f"{nbytes - (at - start)} bytes of host memory could not be pinned (the driver says {code}): "
                    f"copies of them to the device are slower"
                )
                break
            addresses.append(at)
        self._release = weakref.finalize(self, _unpin, memory, driver, addresses, settle, os.getpid())

    def release(self) -> None:
        """Wait for what is copied, and unregister; nothing happens the second time."""
        self._release()


def _unpin(
    memory: torch.Tensor, driver: Registrar, addresses: list[int], settle: Callable[[], None], owner: int
) -> None:
    # `memory` is an argument so that it is not unmapped before
    if os.getpid() != owner:  # a forked child has no driver
        return
    settle()
    for address in addresses:
        driver.unregister(address)


class _Mark:
    """An event of torch's."""

    def __init__(self, event: torch.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class AcceleratorDevice:
    """CUDA, ROCm, XPU and any other backend of torch that has streams: copies run beside the computation.

    Everything but pinning is torch's API for all accelerators.

    Attributes:
        fallbacks: what went another way, with its reason.
    """

    def __init__(self, device: torch.device) -> None:
        # an index, so that nothing is asked of a device that another thread made the current one
        self.device = device if device.index is not None else torch.device(device.type, _current_index(device))
        self.copying = torch.Stream(device=self.device)
        self.fallbacks: list[str] = []
        self._driver = registrar(self.device)

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        tensor.record_stream(self.copying)  # given back while a copy is under way, it is nobody else's before that ends
        return tensor

    def pin(self, tensor: torch.Tensor) -> Pin | None:
        """See `Device.pin`."""
        if self._driver is None or not tensor.numel():
            return None
        pin = Pin(tensor, self._driver, self.copying.synchronize)
        if pin.fault is not None:
            self.fallbacks.append(pin.fault)
        return pin

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """See `Device.copy`."""
        if isinstance(after, _Mark):
            self.copying.wait_event(after.event)
        with self.copying:
            for first, last in _pieces(source):
                target[first:last].copy_(source[first:last], non_blocking=True)
        return self._marked(self.copying)

    def compute_after(self, event: Event) -> None:
        """See `Device.compute_after`."""
        assert isinstance(event, _Mark)
        torch.accelerator.current_stream(self.device).wait_event(event.event)

    def computed(self) -> Event:
        """See `Device.computed`."""
        return self._marked(torch.accelerator.current_stream(self.device))

    def settle(self) -> None:
        """See `Device.settle`."""
        self.copying.synchronize()

    def _marked(self, stream: torch.Stream) -> _Mark:
        event = torch.Event(device=self.device, blocking=True)  # who waits sleeps
        event.record(stream)
        return _Mark(event)


def _current_index(device: torch.device) -> int:
    return int(torch.accelerator.current_device_index()) if torch.accelerator.is_available() else 0


def _pieces(source: torch.Tensor) -> list[tuple[int, int]]:
    """Where a copy is divided: a driver may refuse one that reaches from one registered range into another.

    Ranges begin at multiples of `PIN_CHUNK` from the start of their memory, whose first bytes an item may not be: so
    the storage's own start counts.
    """
    begin = int(source.storage_offset())
    edges = range(-(-(begin + 1) // PIN_CHUNK) * PIN_CHUNK, begin + source.numel(), PIN_CHUNK)
    bounds = [0, *(edge - begin for edge in edges), source.numel()]
    return list(itertools.pairwise(bounds))


class _Past:
    """An event that is already behind us."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class PlainDevice:
    """A device without streams of its own (MPS): copies are ordered with the computation by the backend."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fallbacks: list[str] = []

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, tensor: torch.Tensor) -> Pin | None:
        """See `Device.pin`."""
        return None

    def settle(self) -> None:
        """See `Device.settle`."""
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """See `Device.copy`."""
        target.copy_(source)
        return _Past()

    def compute_after(self, event: Event) -> None:
        """See `Device.compute_after`."""
        return None

    def computed(self) -> Event:
        """See `Device.computed`."""
        return _Past()


def device_for(device: torch.device) -> Device | None:
    """The stream's view of a torch device; None for the processor, where nothing is copied."""
    if device.type == "cpu":
        return None
    return PlainDevice(device) if device.type == "mps" else AcceleratorDevice(device)
