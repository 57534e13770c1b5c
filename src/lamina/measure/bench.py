"""One measured run of a model, beside what its disk can do."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint import Extent
from lamina.errors import RequestError
from lamina.hf.names import PreTrainedModel, StoppingCriteria
from lamina.measure.profile import TOKENS, generate_greedily, profile_model
from lamina.measure.trace_file import DEFAULT, check_trace_file, write_trace
from lamina.plan.forecast import seconds_per_token
from lamina.plan.layout import Layout
from lamina.plan.plan import Plan
from lamina.progress import Progress
from lamina.runtime.engine import Engine
from lamina.runtime.rates import Turns
from lamina.runtime.stats import Stats
from lamina.stream.direct_io import Area
from lamina.stream.experts import Counts
from lamina.stream.probe import SETTINGS, measure_disk

TRIAL = 256 << 20  # bytes that every reader setting reads once
MOST = 8 << 30  # bytes of one turn of the bare disk, spread over the pass
CONTENDERS = 2  # settings that take turns
TURNS_AFTER = 4  # of the bare disk, where none are between the steps
LENT = 32 << 20  # bytes that the bare disk is read into where no ring can lend its own


def bench_model(
    model: str,
    *,
    memory: float | str | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 8,
    prompt_ids: Sequence[int] | None = None,
    context: int | None = None,
    profile: bool = False,
    trace: str | os.PathLike[str] = DEFAULT,
    progress: Progress | None = None,
    load: Callable[..., PreTrainedModel],
    **options: Any,
) -> dict[str, Any]:
    """Load, generate greedily, and measure; between the tokens read a pass's bytes with nothing else going on.

    Args:
        model, memory, context, progress, options: as for `load`, which loads the model.
        prompt_tokens: length of the prompt where `prompt_ids` does not give one.
        new_tokens: tokens to generate; the end-of-text token is not taken.
        prompt_ids: token ids of the prompt.
        profile: afterwards generate again, to see where the time goes; the figures are under `profile`.
        trace: the file that the profiled steps are written to, for https://ui.perfetto.dev.

    Returns:
        Seconds, bytes and rates by name. `disk_fraction` is the rate at which the stream read during the
        decode steps over the best rate at which the drive gave the same bytes alone; None if nothing streams.
        `planned_seconds_per_token` is what the plan said when the model was loaded; `predicted_seconds_per_token` what
        it would have said of drive and processor as this run found them between its steps, and of the experts that its
        tokens needed.
        `bytes_read_per_pass`, `expert_hit_rate` and `expert_bytes_per_token` are those of the decode steps.

    Raises:
        RequestError: a wrong argument, or a file in the place of the trace.
        WriteError: the trace cannot be written; known before the model is loaded, but for a disk that fills meanwhile.
    """
    if new_tokens < 2:  # the first token comes from the prefill
        raise RequestError(f"a decode step needs at least 2 new tokens, got {new_tokens}")
    ids = list(prompt_ids) if prompt_ids else [1 + i % 97 for i in range(prompt_tokens)]
    if context is None:
        context = len(ids) + (max(new_tokens, TOKENS) if profile else new_tokens)
    file = check_trace_file(trace) if profile else None
    loaded = load(model, memory=memory, context=context, progress=progress, **options)
    with loaded.lamina:
        if not hasattr(loaded, "generate"):
            raise RequestError(f"{model} is a {type(loaded).__name__}, which gives no text: it has no decode step")
        meter = _Meter(loaded)
        tokens = generate_greedily(loaded, ids, new_tokens, meter)
        meter.disk_after()
        stats, plan = loaded.lamina.stats, loaded.lamina.plan
        profiled = None if file is None else _profile(loaded, ids, model, file, meter)
    result = {**_speed(meter, stats, plan, len(tokens)), **_work(meter, stats, plan, len(ids), tokens)}
    return result if profiled is None else {**result, "profile": profiled}


def _speed(meter: _Meter, stats: Stats, plan: Plan, tokens: int) -> dict[str, Any]:
    """How fast a run of so many tokens was, with what draft, and in how much memory."""
    disk = meter.disk_bytes_per_second
    return {
        "seconds_per_token": meter.seconds_per_token(tokens),
        "time_to_first_token_seconds": stats.time_to_first_token_seconds,
        "load_seconds": stats.load_seconds,
        "bytes_read_per_pass": round(plan.bytes_streamed_per_pass + meter.expert_bytes_per_step),
        "read_bytes_per_second": meter.read_bytes_per_second,
        "disk_bytes_per_second": disk,
        "disk_fraction": meter.read_bytes_per_second / disk if disk else None,
        "tokens_per_pass": stats.tokens_per_pass,
        "draft": stats.draft,
        "draft_reason": stats.draft_reason,
        "fallbacks": list(stats.fallbacks),
        "draft_bytes": stats.draft_bytes,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "accepted_by_position": stats.accepted_by_position,
        "draft_share_of_time": stats.draft_share_of_time,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "memory_budget_bytes": stats.memory_budget_bytes,
        "resident_bytes": stats.resident_bytes,
        "model_bytes": stats.model_bytes,
    }


def _work(meter: _Meter, stats: Stats, plan: Plan, prompt_tokens: int, tokens: list[int]) -> dict[str, Any]:
    """What a run did: its tokens and passes, its experts, and what the plan expected of it."""
    return {
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(tokens),
        "passes": stats.passes,
        "step_seconds": meter.steps,
        "seconds_waiting_for_disk": stats.seconds_waiting_for_disk,
        "active_bytes_per_token": plan.active_bytes_per_token,
        "expert_hit_rate": meter.expert_hit_rate,
        "expert_prefetched_rate": meter.expert_prefetched_rate,
        "expert_bytes_per_token": meter.expert_bytes_per_step,
        "expert_cache_bytes": plan.expert_cache_bytes,
        "expert_slots": plan.expert_slots,
        "experts": plan.expert_count,
        "predicted_seconds_per_token": _predicted(plan, meter.disk_bytes_per_second, meter),
        "planned_seconds_per_token": plan.predicted_seconds_per_token,
        "planned_rates": asdict(plan.hardware),
        "planned_work": asdict(plan.work),
    }


def _profile(loaded: PreTrainedModel, ids: Sequence[int], model: str, file: Path, meter: _Meter) -> dict[str, Any]:
    """Where the time goes, without another listener; the trace is written."""
    meter.close()
    figures, trace = profile_model(loaded, ids, f"lamina bench {model}")
    facts = {
        "file": str(file),
        "bytes": write_trace(file, trace.record),
        "events": len(trace.record["traceEvents"]),
        "operations_dropped": trace.dropped,
        "dropped_below_seconds": trace.dropped_below / 1e9,
    }
    return {**figures, "trace": facts}


def _predicted(plan: Plan, disk: float, meter: _Meter) -> float:
    """The plan's model of time with the rates measured between the steps, and the experts really read."""
    hardware = meter.products.applied(plan.hardware)
    hardware = replace(hardware, disk_bytes_per_second=disk) if disk else hardware
    return seconds_per_token(replace(plan.work, expert_bytes=meter.expert_bytes_per_step), hardware)


class _Meter(StoppingCriteria):  # type: ignore[misc]
    """Between two decode steps the bare disk has its turn, and so have products of one row: all see the same machine.

    It reads what the step read: the units of a pass into the ring, which lends its memory and is filled again before
    the next step, and the experts that the step was missing. A step is given no credit for a ring that was full when
    it began: its rate counts the bytes that were read within it, and its seconds are scaled to all that it needed.
    It ends with the reads that are under way, as the bare disk's turn does: bytes and seconds belong together.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.lamina = model.lamina
        self.engine: Engine = self.lamina.engine
        plan = self.lamina.plan
        self.drafts = self.lamina.speculation.draft != "none"
        self._passes = 0
        self.per_pass = plan.bytes_streamed_per_pass
        self.extents = [
            Extent(read.file, read.offset, read.needed)
            for index in plan.steps
            if not plan.items[index].cached
            for read in plan.items[index].layout.reads
        ]
        self.products = Turns(self.engine)
        self.steps: list[float] = []
        self.alone: dict[tuple[int, int], list[float]] = {}
        self.read_bytes = self.read_seconds = 0.0
        self._resumed: tuple[float, int] | None = None
        self._missed: list[Layout] = []
        self._at_first = self._counts
        if self.engine.experts is not None:
            self.engine.experts.on_read = self._missed.append
        self._window = self.engine.stream.window if self.engine.stream is not None else None

    def close(self) -> None:
        """Watch no more; the ring's memory is the stream's again."""
        if self.engine.experts is not None:
            self.engine.experts.on_read = None
        self._window = None

    @property
    def _counts(self) -> Counts:
        return replace(self.engine.experts.counts) if self.engine.experts is not None else Counts()

    @property
    def expert_bytes_per_step(self) -> float:
        """Bytes of experts that a decode step read."""
        return (self._counts.nbytes - self._at_first.nbytes) / len(self.steps) if self.steps else 0.0

    @property
    def expert_hit_rate(self) -> float | None:
        """Of the experts that the decode steps were routed to, the share that was there."""
        routed = self._counts.routed - self._at_first.routed
        if not routed:
            return self.engine.plan.hit_rate_without_reading
        return (self._counts.hits - self._at_first.hits) / routed

    @property
    def expert_prefetched_rate(self) -> float | None:
        """The share that was there, or on its way, because it was prefetched."""
        routed = self._counts.routed - self._at_first.routed
        return (self._counts.prefetched - self._at_first.prefetched) / routed if routed else None

    def seconds_per_token(self, tokens: int) -> float:
        """Of a decode step: the median; with a draft the time of all steps over their tokens."""
        if self.drafts:
            return sum(self.steps) / max(tokens - 1, 1)
        return statistics.median(self.steps)

    @property
    def read_bytes_per_second(self) -> float:
        """What the stream read during the decode steps."""
        return self.read_bytes / self.read_seconds if self.read_seconds else 0.0

    @property
    def disk_bytes_per_second(self) -> float:
        """What the drive gives alone: the best setting, each by the mean of its turns."""
        return max((statistics.harmonic_mean(rates) for rates in self.alone.values() if rates), default=0.0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        computed = time.perf_counter()
        if self.drafts:
            self._between_drafted(computed)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        now, read = self._settled()
        missed = sum(layout.read_bytes for layout in self._missed)
        if self._resumed is None:
            self._at_first = self._counts
        else:
            seconds, nbytes = now - self._resumed[0], read - self._resumed[1]
            self.read_seconds += seconds
            self.read_bytes += nbytes
            # without a ring nothing was read before the step began, and what was prefetched may have been taken back
            streams = self.engine.stream is not None and nbytes
            self.steps.append(seconds * (self.per_pass + missed) / nbytes if streams else computed - self._resumed[0])
        self._disk_alone()
        self.products.take()
        self._missed.clear()
        self._resumed = time.perf_counter(), self.engine.readers.bytes_read
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _between_drafted(self, now: float) -> None:
        """With a draft a step gives several tokens, and reading continues while a draft computes: wall time."""
        passes, read = self.lamina.passes, self.engine.readers.bytes_read
        if passes == self._passes:
            return
        if self._resumed is None:
            self._at_first = self._counts
        else:
            self.steps.append(now - self._resumed[0])
            self.read_seconds += now - self._resumed[0]
            self.read_bytes += read - self._resumed[1]
        self._passes, self._resumed = passes, (now, read)

    def disk_after(self) -> None:
        """What the drive gives alone, where it was not measured between the steps."""
        self._missed.clear()
        for _ in range(1 + TURNS_AFTER if self.drafts else 0):
            self._settled()
            self._disk_alone()
            self.products.take()

    def _settled(self) -> tuple[float, int]:
        """The time and the bytes read once what is under way has ended; until then nothing else begins."""
        readers = self.engine.readers
        try:
            readers.pause()
            return time.perf_counter(), readers.bytes_read
        finally:
            readers.resume()

    def _disk_alone(self) -> None:
        """Read what the last step read, and leave the ring as full as it was."""
        experts = [Extent(r.file, r.offset, r.needed) for layout in self._missed for r in layout.reads]
        extents = self.extents + experts
        if not extents:
            return
        stream = self.engine.stream
        if stream is not None:
            stream.rewind()
        if self._window is None:
            self._window = Area(LENT)
        if len(self.alone) < len(SETTINGS):  # at first every setting on a part of the bytes, then the best ones on all
            for setting in SETTINGS:
                self.alone.setdefault(setting, []).append(measure_disk(extents, TRIAL, [setting], self._window))
            ranked = sorted(self.alone, key=lambda setting: -max(self.alone[setting]))
            self.turns = itertools.cycle(ranked[:CONTENDERS])
            self.alone = {setting: [] for setting in SETTINGS}
        setting = next(self.turns)
        self.alone[setting].append(measure_disk(extents, MOST, [setting], self._window))
        if stream is not None:
            stream.pump()
            self.engine.readers.settle()
