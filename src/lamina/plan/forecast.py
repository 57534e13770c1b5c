"""How long a decode step takes: bytes and calls over the rates of a machine. Pure functions.

A step of one token keeps three things busy at once, the drive, the link to an accelerator, and the processor (or the
accelerator), and takes about as long as the one that is busy longest:

    drive      streamed bytes / (`stream_share` of what the drive gives alone)
    link       bytes that cross to the accelerator / link
    compute    plain bytes / memory + unpacked bytes / (`UNPACKED_SHARE` of unpacking) + operations x seconds of one
               + `reading_cost` x the drive's seconds

*Compute* is bound by memory in the products of one row, by the codec where weights are unpacked, and by Python and
torch's dispatch in a small model: the trace counts what a pass calls. The last term is what reading takes from a
processor that multiplies at the same time, cores and memory bus both.

The three overlap through a window of a few units, which evens out only so much: where two of them are busy about as
long, each waits for the other now and then. The sum is therefore a norm of a high order (`OVERLAP`) in place of the
plain maximum: 12% more than either where two are alike, nothing where one is twice the other.

Experts overlap with nothing: which ones to read is known only when everything before them is computed. Their bytes
come on top, in bursts of a layer each, in which the drive gives `EXPERT_SHARE` of its rate.

The constants are fitted to the runs of benchmarks/results (docs/scale.md has the errors that are left).
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_LOST = 18e6  # bytes of the window that the drive has nothing of: the model is at them, or they wait to be read
EXPERT_SHARE = 0.67  # of the bare drive, where a layer's experts are read and everybody waits for them
UNPACKED_SHARE = 0.88  # of the rate of packed products in a row: between those of a model threads fall asleep
OVERLAP = 6.0  # order of the norm
CALL_OPERATIONS = 7  # a call of a module costs as much as so many operations of torch
EXPERT_OPERATIONS = 24  # of one expert that a token is routed to; the trace sees a stand-in
READ_OPERATIONS = 40  # of a unit or an expert that is bound, released, and ordered again
UNTRACED_OPERATIONS = 4  # of a call, where the trace could not count


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates the forecast uses; bytes per second where nothing else is said.

    Attributes:
        disk_bytes_per_second: of the drive, nothing else going on.
        memory_bytes_per_second: at which products of one row go through plain weights.
        link_bytes_per_second: from memory to the accelerator.
        decoding_bytes_per_second: of the weights that a codec makes and multiplies, as they are once unpacked.
        operation_seconds: of one small operation of torch within a model.
        reading_cost: seconds that computing takes longer for each second that the drive is read meanwhile.
    """

    disk_bytes_per_second: float = 1e9
    memory_bytes_per_second: float = 1e10
    link_bytes_per_second: float = 1e10
    decoding_bytes_per_second: float = 1e10
    operation_seconds: float = 2e-6
    reading_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a decode step of one token has to move and to compute.

    Attributes:
        streamed_bytes: that every pass reads, for any tokens.
        expert_bytes: that are read when a token is routed to them.
        linked_bytes: that cross to the accelerator.
        plain_bytes: of weights that are multiplied as they are.
        unpacked_bytes: of weights that a codec unpacks, once unpacked.
        operations: of torch, with what modules and experts cost beside them counted as such.
        window_bytes: of the ring that the stream flows through.
    """

    streamed_bytes: float = 0.0
    expert_bytes: float = 0.0
    linked_bytes: float = 0.0
    plain_bytes: float = 0.0
    unpacked_bytes: float = 0.0
    operations: float = 0.0
    window_bytes: float = 0.0


def stream_share(window_bytes: float) -> float:
    """The share of the bare drive that a stream through so large a window reaches: 0.92 with 200 MB, 0.5 with 18."""
    return window_bytes / (window_bytes + WINDOW_LOST)


def drive_seconds(work: Work, hardware: Hardware) -> float:
    """How long the drive is busy with what streams."""
    if not work.streamed_bytes:
        return 0.0
    return work.streamed_bytes / (hardware.disk_bytes_per_second * stream_share(work.window_bytes))


def compute_seconds(work: Work, hardware: Hardware) -> float:
    """How long the processor is busy with a step, with nothing read meanwhile."""
    return (
        work.plain_bytes / hardware.memory_bytes_per_second
        + work.unpacked_bytes / (hardware.decoding_bytes_per_second * UNPACKED_SHARE)
        + work.operations * hardware.operation_seconds
    )


def seconds_per_token(work: Work, hardware: Hardware) -> float:
    """How long a decode step takes."""
    drive = drive_seconds(work, hardware)
    experts = work.expert_bytes / (hardware.disk_bytes_per_second * EXPERT_SHARE)
    link = work.linked_bytes / hardware.link_bytes_per_second
    compute = compute_seconds(work, hardware) + hardware.reading_cost * drive
    return experts + _overlapped(drive, link, compute)


def _overlapped(*seconds: float) -> float:
    """How long it takes to do all of these at once through a finite window."""
    longest = max(seconds)
    if not longest:
        return 0.0
    together: float = sum((each / longest) ** OVERLAP for each in seconds) ** (1 / OVERLAP)
    return longest * together
