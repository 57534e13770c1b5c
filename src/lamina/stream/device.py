"""Where the model computes, reduced to what the stream must know: copies and events.

On the processor weights are computed on where they were read. On an accelerator they are copied on a
stream of their own, and two events order the copy against the computation. `Lane` holds that order, once,
for every device: a slot is copied into only after the computation that used it before is done, computed on
only after its copy is done, and the host bytes are read over only after their copy is done.
"""

from __future__ import annotations

from collections import deque
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

    def pin(self, tensor: torch.Tensor) -> None:
        """Make host memory fast to copy from, if the device knows how."""

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
        self._last_used: Event | None = None

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
        """Take every slot back; no computation that needs one will be queued any more."""
        self._last_used = self.device.computed()
        self._slots.clear()
        self._ring.clear()


class _CudaEvent:
    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice:
    """CUDA and XPU: a copy stream beside the computing one, host memory pinned in place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device)
        self.copying = self.module.Stream(device=device)

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, tensor: torch.Tensor) -> None:
        """See `Device.pin`."""
        if self.device.type == "cuda":
            cudart: Any = torch.cuda.cudart  # has no types
            cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """See `Device.copy`."""
        if isinstance(after, _CudaEvent):
            self.copying.wait_event(after.event)
        with self.module.stream(self.copying):
            target.copy_(source, non_blocking=True)
            event = self.module.Event()
            event.record(self.copying)
        return _CudaEvent(event)

    def compute_after(self, event: Event) -> None:
        """See `Device.compute_after`."""
        assert isinstance(event, _CudaEvent)
        self.module.current_stream(self.device).wait_event(event.event)

    def computed(self) -> Event:
        """See `Device.computed`."""
        event = self.module.Event()
        event.record(self.module.current_stream(self.device))
        return _CudaEvent(event)


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

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, tensor: torch.Tensor) -> None:
        """See `Device.pin`."""
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
    return CudaDevice(device) if device.type in ("cuda", "xpu") else PlainDevice(device)
