"""The rates of this machine that the forecast needs, measured with the weights at hand in a fifth of a second.

The drive is read as the stream reads it. Products of one row go through some 100 MB of the model's own weights, read
for the purpose and given back: more than a processor's cache holds, in the shapes that the model has. What a call
costs is timed on a small module. All of it happens before the residents are loaded, so it takes no memory that the
budget has not left.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from lamina.checkpoint import Checkpoint
from lamina.codec import AFFINE, LOSSLESS
from lamina.plan.expert_slots import experts_of
from lamina.plan.forecast import Hardware
from lamina.plan.layout import Part, lay_out
from lamina.plan.schedule import Convert, PanelSpan, Schedule, Weight
from lamina.runtime.engine import Engine
from lamina.stream.device import device_for
from lamina.stream.direct_io import Area
from lamina.stream.probe import drive_rate
from lamina.stream.readers import Readers
from lamina.tensors.packed import PackedTensor, Scratch

SAMPLE = 96 << 20  # bytes of weights that are multiplied, as they are stored: several times a large cache
LARGEST_PART = 16 << 20  # of one weight
LINKED = 32 << 20  # bytes that are copied to a device to time the link
LINK_ROUNDS = 4
SAMPLE_SHARE = 0.5  # of what the budget has for weights, where that is less
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
PRODUCT_SECONDS = 0.05  # no further round begins after that
DRIVE_SECONDS = 0.1
MADE_UP = 1 << 20  # numbers that are encoded where no weights can be read
FLOATS = ("float", "bfloat")
PLAIN = ""  # the codec of weights that have none
PROBED_OPERATIONS = 17  # of `_probe`: ten of torch, and the call of a module
PROBE_CALLS, PROBE_ROUNDS = 40, 7
PLUMBING = 1.5  # what an operation costs within transformers' modules, over the bare one: median of eleven families
READING_CORES = 0.5  # of a core that is gone while the drive is read: stores.jsonl, two cores


def measure(engine: Engine, checkpoint: Checkpoint, seconds: float = DRIVE_SECONDS) -> Hardware:
    """The rates of this machine for this model.

    Args:
        engine: not started.
        checkpoint: what the drive is read for; all of it may lie on the hub.
        seconds: to read the drive for, where anything streams.
    """
    plan = engine.plan
    room = plan.budget.memory_bytes - plan.budget.of_the_process
    if plan.budget.device_memory_bytes is not None:
        room = min(room, plan.budget.device_memory_bytes)
    sample = max(min(SAMPLE, int(room * SAMPLE_SHARE)), 1)
    with contextlib.closing(Readers(fingerprints=checkpoint.fingerprints)) as readers:  # the engine's own count bytes
        rates = products(engine, readers, sample)
    drive = drive_rate(checkpoint, seconds, sample) if plan.streams else None
    hardware = _hardware(engine.weights.schedule, rates, drive, engine.device)
    link = _link_rate(engine.device, min(sample, LINKED)) if plan.streams else None
    return hardware if link is None else replace(hardware, link_bytes_per_second=link)


def _link_rate(device: torch.device, nbytes: int) -> float | None:
    """Bytes a second from pinned memory to the device; None where nothing is copied."""
    link = device_for(device)
    if link is None:
        return None
    source, target = Area(nbytes), link.memory(nbytes)
    pin = link.pin(source.tensor)
    took = []
    for _ in range(LINK_ROUNDS):
        began = time.perf_counter()
        link.copy(target, source.tensor[:nbytes], link.computed())
        link.settle()
        took.append(time.perf_counter() - began)
    if pin is not None:
        pin.release()
    return nbytes / max(statistics.median(took[1:]), 1e-9)  # the first maps memory


def assume(schedule: Schedule, checkpoint: Checkpoint, streams: bool, device: torch.device) -> Hardware:
    """The same for weights that cannot be read yet: made-up ones of the same kinds, and the drive of `checkpoint`."""
    rates = {}
    for codec, weights in _by_codec(schedule).items():
        made = _made_up(weights[len(weights) // 2], device)
        if made is not None:
            rates[codec] = _rate(made)
    drive = drive_rate(checkpoint, DRIVE_SECONDS, SAMPLE) if streams else None
    return _hardware(schedule, rates, drive, device)


def _hardware(schedule: Schedule, rates: Mapping[str, float], drive: float | None, device: torch.device) -> Hardware:
    hardware = _computing(machine(device), schedule, rates)
    return replace(hardware, disk_bytes_per_second=drive) if drive is not None else hardware


def _computing(hardware: Hardware, schedule: Schedule, rates: Mapping[str, float]) -> Hardware:
    """`hardware` with the rates of products, by codec, that were measured."""
    if PLAIN in rates:
        hardware = replace(hardware, memory_bytes_per_second=rates[PLAIN])
    unpacking = _unpacking(schedule, rates)
    return hardware if unpacking is None else replace(hardware, decoding_bytes_per_second=unpacking)


def machine(device: torch.device) -> Hardware:
    """What is known without weights or a drive."""
    cost = READING_CORES / torch.get_num_threads() if device.type == "cpu" else 0.0
    return Hardware(operation_seconds=PLUMBING * _probe(), reading_cost=cost)


def products(engine: Engine, readers: Readers, sample: int) -> dict[str, float]:
    """By codec, bytes of finished weights that a product of one row goes through in a second."""
    kinds = _by_codec(engine.weights.schedule)
    return {
        codec: _rate(list(_read(engine, readers, weights, sample // len(kinds))), PRODUCT_SECONDS / len(kinds))
        for codec, weights in kinds.items()
    }


class Turns:
    """Products of a row with weights that are resident anyway, timed now and then: what the processor gives meanwhile.

    They take no memory. Where less is resident than a cache might hold, the rates that were measured at load stay.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        resident = {
            codec: [weight for weight in weights if weight.name in engine.plan.resident and len(weight.shape) == 2]
            for codec, weights in _by_codec(engine.weights.schedule).items()
        }
        enough = sum(weight.nbytes for weights in resident.values() for weight in weights) >= SAMPLE // 2
        self._matrices = {codec: _some(engine, weights) for codec, weights in resident.items() if weights and enough}
        self._rounds: dict[str, list[float]] = defaultdict(list)

    def take(self) -> None:
        """Time each product once."""
        with torch.inference_mode():
            for codec, matrices in self._matrices.items():
                self._rounds[codec].append(sum(_product(_row(matrix), matrix) for matrix in matrices))

    def applied(self, hardware: Hardware) -> Hardware:
        """`hardware` with the rates of all turns but the first, which starts threads."""
        rates = {}
        for codec, rounds in self._rounds.items():
            if len(rounds) > 1:
                rates[codec] = _nbytes(self._matrices[codec]) / statistics.median(rounds[1:])
        return _computing(hardware, self._engine.weights.schedule, rates)


def _some(engine: Engine, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Of resident matrices some `SAMPLE` bytes, from all over them: large ones as often as their bytes ask for."""
    share = min(SAMPLE / sum(weight.nbytes for weight in weights), 1.0)
    chosen, owed = [], 0.0
    for weight in weights:
        owed += share * weight.nbytes
        if owed >= weight.nbytes / 2:
            owed -= weight.nbytes
            chosen.append(engine.sites.bound(weight.name))
    return chosen


def _by_codec(schedule: Schedule) -> dict[str, list[Weight]]:
    """The matrices that products are made with."""
    kinds: dict[str, list[Weight]] = defaultdict(list)
    for weight in schedule.weights.values():
        if len(weight.shape) < 2 or weight.gathered or not weight.elements or not weight.dtype.startswith(FLOATS):
            continue
        if weight.convert in (Convert.NONE, Convert.CAST):
            kinds[PLAIN].append(weight)
        elif weight.convert is Convert.UNPACK and weight.segments:
            kinds[weight.segments[0].codec].append(weight)
    return kinds


def _read(engine: Engine, readers: Readers, weights: Sequence[Weight], sample: int) -> Iterator[torch.Tensor]:
    """Matrices with `sample` bytes of these weights, from all over them."""
    mean = sum(min(weight.stored_nbytes, LARGEST_PART) for weight in weights) / len(weights)
    count = min(max(int(sample / mean), 1), len(weights))
    begun = []
    for weight in (weights[i * len(weights) // count] for i in range(count)):
        layout = lay_out([(weight, Part(weight.name, 0, _rows(weight, min(sample // count, LARGEST_PART))))])
        area = Area(layout.nbytes)
        begun.append((weight, layout, area, readers.submit(layout.reads, area)))
    for weight, layout, area, ticket in begun:
        readers.wait(ticket)
        yield engine.materializer.finish(layout.placed[0], area.tensor.to(engine.device)).view(-1, weight.shape[-1])


def _rows(weight: Weight, most: int) -> int:
    """Of a weight, so many indices of dimension 0 as `most` bytes hold, in whole panels; one panel at least."""
    if not weight.by_rows:
        return weight.rows
    step = weight.segments[0].panel_rows if weight.segments and len(weight.shape) == 2 else 1
    rows = max(most * weight.rows // weight.stored_nbytes // step, 1) * step
    return min(rows, weight.rows)


def _made_up(weight: Weight, device: torch.device) -> list[torch.Tensor] | None:
    """Matrices stored like `weight` that hold no weights; None where no codec of ours would write them."""
    columns, dtype = weight.shape[-1], getattr(torch, weight.dtype)
    if weight.convert is not Convert.UNPACK:
        rows = max(LARGEST_PART // (columns * dtype.itemsize), 1)
        one = torch.full((1, columns), 0.5, dtype=dtype).view(torch.uint8).expand(rows, -1)
        return [_apart(one).view(dtype).view(rows, columns).to(device) for _ in range(SAMPLE // LARGEST_PART)]
    segment = weight.segments[0]
    block = torch.randn(max(MADE_UP // columns // segment.panel_rows, 1) * segment.panel_rows, columns)
    if segment.codec in AFFINE:
        panels = AFFINE[segment.codec].encode(block.bfloat16())
    elif segment.codec == LOSSLESS.name:
        need = LOSSLESS.need(block.bfloat16(), segment.panel_rows)
        panels = LOSSLESS.encode(block.bfloat16(), segment.panel_rows, need)
    else:
        return None
    copies, scratch = max(SAMPLE // panels.numel(), 1), Scratch()
    span = PanelSpan(segment.codec, 0, len(panels), segment.panel_rows, panels.shape[1], len(block), 0, len(block))
    return [PackedTensor((len(block), columns), dtype, _apart(panels).to(device), (span,), scratch)
            for _ in range(copies)]  # fmt: skip


def _apart(nbytes: torch.Tensor) -> torch.Tensor:
    """A copy, flat, in memory that the system has back when it is dropped: an allocator would keep it."""
    area = Area(nbytes.numel())
    copied = area.tensor[: nbytes.numel()]
    copied.view(nbytes.shape).copy_(nbytes)
    return copied


def _rate(matrices: Sequence[torch.Tensor], most: float = PRODUCT_SECONDS) -> float:
    """Bytes of these matrices over the seconds of a row's product with each of them: usual ones, not the quickest."""
    rows = [_row(matrix) for matrix in matrices]
    rounds: list[list[float]] = []
    began = time.perf_counter()
    with torch.inference_mode():
        while len(rounds) <= FEWEST_ROUNDS or (len(rounds) <= MOST_ROUNDS and time.perf_counter() - began < most):
            rounds.append([_product(row, matrix) for row, matrix in zip(rows, matrices, strict=True)])
    later = zip(*rounds[1:], strict=True)  # the first one starts threads
    usual: float = sum(statistics.median(seconds) for seconds in later)
    return _nbytes(matrices) / max(usual, 1e-9)


def _nbytes(matrices: Iterable[torch.Tensor]) -> int:
    """Of all their elements, unpacked."""
    return sum(matrix.numel() * matrix.dtype.itemsize for matrix in matrices)


def _row(matrix: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)


def _product(row: torch.Tensor, matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.linear(row, matrix)[0, 0].item()  # an accelerator has finished then
    return time.perf_counter() - began


def _unpacking(schedule: Schedule, rates: Mapping[str, float]) -> float | None:
    """The rate over all codecs, each weighed by what a token needs of it; None where nothing is unpacked."""
    experts = experts_of(schedule, schedule.weights.values())
    routed = {weight.name: module.routed / module.count for module in experts for weight in module.weights}
    nbytes = seconds = 0.0
    for codec, weights in _by_codec(schedule).items():
        if codec != PLAIN and codec in rates:
            needed = sum(weight.unpacked_nbytes * routed.get(weight.name, 1.0) for weight in weights)
            nbytes, seconds = nbytes + needed, seconds + needed / rates[codec]
    return nbytes / seconds if seconds else None


class _Norm(torch.nn.Module):
    """Ten operations, as a model's small modules have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        narrow = torch.nn.functional.silu(wide.to(x.dtype).view(1, 1, 4, -1).transpose(1, 2))
        return torch.cat((narrow, narrow), -1)


def _probe() -> float:
    """Seconds of one small operation, on the processor: an accelerator's are started there."""
    module, x = _Norm(), torch.ones(1, 1, 64, dtype=torch.bfloat16)
    took = []
    with torch.inference_mode():
        for _ in range(PROBE_ROUNDS):
            began = time.perf_counter()
            for _ in range(PROBE_CALLS):
                module(x)
            took.append(time.perf_counter() - began)
    return statistics.median(took) / (PROBE_CALLS * PROBED_OPERATIONS)
