"""Where the seconds of a decode step go, and a trace of some steps.

Two kinds of steps, so that no figure is the profiler's own. In the *timed* ones a pair of clock readings surrounds each
thing that Lamina does: their wall time is what the split adds up to. In the *profiled* ones torch's profiler tells
besides when an operation runs. What is left of a timed step after waiting, unpacking, copying and Lamina's hooks is
torch's arithmetic and the Python between its calls, divided as in the profiled steps.

What the runtime, the stream and packed weights do is heard at their points (`lamina.stream.observe`).
"""

from __future__ import annotations

import bisect
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.profiler import profile as torch_profiler
from torch.autograd.profiler import record_function

from lamina.hf.names import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from lamina.host import peak_resident_bytes
from lamina.measure.timeline import (
    BETWEEN,
    COMPUTE,
    LAYER,
    MODEL,
    OP,
    PASS,
    STEP,
    ChromeTrace,
    ReadSpan,
    Span,
    by_call,
    chrome_trace,
    drive_of,
    nested,
    owners,
)
from lamina.runtime.engine import Engine
from lamina.stream.observe import COPY, LAMINA, THROUGH, UNPACK, WAIT, listen

STEPS = 3  # of each kind
TOKENS = 2 * STEPS + 3  # of the prompt's pass, one that nothing is measured in, the steps, one to count operations in
MOST_RECORDED = 50_000  # spans and reads after which no further step is recorded: they take memory that is promised
MOST_OPERATIONS = 30_000  # the same for torch's profiler, which takes 2.4 kB for each
MARKS = 5  # readings of both clocks, of which the closest pair counts
MARK = "lamina: both clocks"
WARMING, TIMED, COUNTED, PROFILED = "warming", "timed", "counted", "profiled"


class Recording:
    """What happens between `start` and `stop` to a model, its stream and its readers; used in the thread that runs it.

    Attributes:
        spans: of this thread, in the order in which they ended.
        reads: of the reader threads.
        levels: bytes of the ring that are taken, from a moment on.
        full: from and until when the ring had no room.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.engine: Engine = model.lamina.engine
        self.spans: list[Span] = []
        self.reads: list[ReadSpan] = []
        self.levels: list[tuple[int, int]] = []
        self.full: list[tuple[int, int]] = []
        self._full_since: int | None = None
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Listen to the points, the readers and the model's modules."""
        self._thread = threading.get_ident()
        self._undo.append(listen(self))
        self._watch_modules({id(module): name for name, module in self.model.named_modules()})
        self.engine.readers.tell(self._on_read)

    def span(self, kind: str, name: str, begin: int, end: int) -> None:
        """See `lamina.stream.observe.Listener`."""
        if threading.get_ident() == self._thread:
            self.spans.append(Span(kind, name, begin, end))

    def ring(self, taken: int, full: bool) -> None:
        """See `lamina.stream.observe.Listener`."""
        now = time.perf_counter_ns()
        if full:
            self._full_since = self._full_since or now
            return
        self._room(now)
        self.levels.append((now, taken))

    def stop(self) -> None:
        """Put everything back as it was."""
        self.engine.readers.tell(None)
        while self._undo:
            self._undo.pop()()

    def forget(self) -> None:
        """Begin again with nothing recorded."""
        for recorded in (self.spans, self.reads, self.full):
            recorded.clear()
        del self.levels[:-1]

    def _watch_modules(self, names: dict[int, str]) -> None:
        """The model itself, for its passes, and its decoder layers."""
        for module, kind in [(self.model, PASS), *((layer, LAYER) for layer in _layers(self.model))]:
            began: list[int] = []
            name = names[id(module)] or "forward"

            def enter(*_: object, began: list[int] = began) -> None:
                began.append(time.perf_counter_ns())

            def leave(*_: object, began: list[int] = began, kind: str = kind, name: str = name) -> None:
                if began:
                    self.spans.append(Span(kind, name, began.pop(), time.perf_counter_ns()))

            self._undo.append(module.register_forward_pre_hook(enter, prepend=True).remove)
            self._undo.append(module.register_forward_hook(leave, always_call=True).remove)

    def _room(self, now: int) -> None:
        if self._full_since is not None:
            self.full.append((self._full_since, now))
            self._full_since = None

    def full_until(self, now: int) -> list[tuple[int, int]]:
        """`full`, and what is still full."""
        return self.full + ([(self._full_since, now)] if self._full_since is not None else [])

    def _on_read(self, file: str, offset: int, nbytes: int, began: int) -> None:
        name = threading.current_thread().name
        self.reads.append(ReadSpan(name, file, offset, nbytes, began, time.perf_counter_ns()))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list of modules."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)
    return list(next(lists, ()))


class Step(NamedTuple):
    """One decode step, from the choice of a token to the choice of the next; nanoseconds."""

    stage: str
    begin: int
    end: int


class _Stages(StoppingCriteria):  # type: ignore[misc]
    """Called between two steps: ends one, and sets up what the next one is for."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.steps = recording, list[Step]()
        self.operations: list[Span] = []
        self._begin = 0
        self._coming = iter((WARMING, *[TIMED] * STEPS, COUNTED, *[PROFILED] * STEPS))
        self._stage: str | None = None
        self._per_step = 0
        self._torch: _TorchProfile | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        now = time.perf_counter_ns()
        before = self._stage
        if before is not None:
            self.steps.append(Step(before, self._begin, now))
        stage = next(self._coming, None)
        while stage == before and stage is not None and self._enough():
            stage = next(self._coming, None)
        self._begin, self._stage = now, stage
        if stage != before:
            self._change(stage)
            if stage != TIMED or before != WARMING:
                self._begin = time.perf_counter_ns()
        return torch.full((input_ids.shape[0],), stage is None, dtype=torch.bool, device=input_ids.device)

    def _enough(self) -> bool:
        recorded = len(self.recording.spans) + len(self.recording.reads)
        done = sum(step.stage == self._stage for step in self.steps)
        return recorded > MOST_RECORDED or (self._stage == PROFILED and (done + 1) * self._per_step > MOST_OPERATIONS)

    def _change(self, stage: str | None) -> None:
        if stage == TIMED:
            self.recording.forget()
        if self._torch is not None:
            self.operations = self._torch.stop()
            self._per_step = len(self.operations)
            self._torch = None
        if stage in (COUNTED, PROFILED):
            self._torch = _TorchProfile()

    def close(self) -> None:
        """However it ended: torch's profiler is one for the process."""
        if self._torch is not None:
            self._torch.stop()
            self._torch = None


class _TorchProfile:
    """Operations of this thread as torch's profiler sees them, on the clock of the spans."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] = []
        begin: Any = torch_profiler  # torch.profiler's own takes 70 MB more to begin with
        self._profile = begin(use_kineto=True)
        self._profile.__enter__()
        self._mark()

    def _mark(self) -> None:
        for _ in range(MARKS):
            before = time.perf_counter_ns()
            with record_function(MARK):
                self._marks.append((before, time.perf_counter_ns()))

    def stop(self) -> list[Span]:
        """The operations, oldest first."""
        self._mark()
        self._profile.__exit__(None, None, None)
        events: Any = self._profile.kineto_results
        seen = [(e.name(), e.start_ns(), e.duration_ns(), e.start_thread_id()) for e in events.events()]
        marks = sorted((start, thread) for name, start, _, thread in seen if name == MARK)
        if len(marks) != len(self._marks):
            return []
        begin, end = self._closest(marks[:MARKS], 0), self._closest(marks[MARKS:], MARKS)
        slope = (end[1] - begin[1]) / max(end[0] - begin[0], 1)

        def ours(at: int) -> int:
            return begin[1] + round((at - begin[0]) * slope)

        this = marks[0][1]
        return [Span(OP, name, ours(at), ours(at + long)) for name, at, long, thread in seen
                if thread == this and name != MARK]  # fmt: skip

    def _closest(self, marks: list[tuple[int, int]], first: int) -> tuple[int, int]:
        """One moment on both clocks: torch's, ours."""
        pairs = zip(marks, self._marks[first:], strict=False)
        (at, _), (before, after) = min(pairs, key=lambda pair: pair[1][1] - pair[1][0])
        return at, (before + after) // 2


@contextmanager
def _recorded(recording: Recording, stages: _Stages) -> Iterator[None]:
    try:
        recording.start()
        yield
    finally:
        stages.close()
        recording.stop()


def generate_greedily(
    model: PreTrainedModel, ids: Sequence[int], new_tokens: int, between: StoppingCriteria
) -> list[int]:
    """The tokens after a prompt, as many as asked for, even past an end of the text; `between` is called after each."""
    prompt = torch.tensor([list(ids)], device=model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([between]),
    )
    return [int(token) for token in out[0, len(ids) :]]


def profile_model(model: PreTrainedModel, ids: Sequence[int], title: str) -> tuple[dict[str, Any], ChromeTrace]:
    """Generate `TOKENS` tokens, or fewer of a model with very many units; where the time went.

    Args:
        ids: of the prompt.
        title: of the trace.

    Returns:
        Figures by name (docs/how-it-works.md has them all), and the trace of the profiled steps.
    """
    recording = Recording(model)
    stages = _Stages(recording)
    with _recorded(recording, stages):
        generate_greedily(model, ids, TOKENS, stages)
    timed = [step for step in stages.steps if step.stage == TIMED]
    profiled = [step for step in stages.steps if step.stage == PROFILED]
    figures = _split(recording, stages, timed, profiled)
    trace = _trace(title, recording, stages, profiled)
    return figures, trace


def _split(recording: Recording, stages: _Stages, timed: list[Step], profiled: list[Step]) -> dict[str, Any]:
    """The figures: per step, the mean of the timed ones."""
    spans, with_operations = nested(recording.spans), nested(recording.spans + stages.operations)
    sums, under = _sums(spans, timed), _sums(with_operations, profiled)
    calls = by_call([span for span in spans if timed[0].begin <= span.begin < timed[-1].end])
    count = len(timed) * 1e9
    # in a timed step torch's own time and Python's are one; in a profiled one they are measured apart
    unknown = sums[MODEL] + sums[THROUGH]
    known = under[MODEL] + under[THROUGH] + under[COMPUTE]
    parts = {owner: unknown * under[owner] / known if known else 0.0 for owner in (MODEL, THROUGH, COMPUTE)}
    wall = sum(step.end - step.begin for step in timed) / count
    seconds = {
        "waiting_for_disk": sums[WAIT] / count,
        "decoding": sums[UNPACK] / count,
        "copying": sums[COPY] / count,
        "computing": parts[COMPUTE] / count,
        "lamina_python": (sums[LAMINA] + parts[THROUGH]) / count,
        "model_python": parts[MODEL] / count,
        "between_passes": sums[BETWEEN] / count,
    }
    in_pass = wall - seconds["between_passes"]
    python = seconds["lamina_python"] + seconds["model_python"]
    return {
        "steps": len(timed),
        "profiled_steps": len(profiled),
        "seconds_per_step": wall,
        "profiled_seconds_per_step": statistics.fmean(step.end - step.begin for step in profiled) / 1e9,
        "seconds": seconds,
        "shares": {name: value / wall for name, value in seconds.items()},
        "pass_seconds": in_pass,
        "python_seconds_per_pass": python,
        "python_share_of_pass": python / in_pass,
        "lamina_python_seconds_per_pass": seconds["lamina_python"],
        "lamina_python_by_call": {call: spent / count for call, spent in calls.most_common()},
        "disk": _disk(recording, timed),
        "peak_rss_bytes": peak_resident_bytes(),
    }


def _sums(spans: Sequence[Span], steps: Sequence[Step]) -> Counter[str]:
    sums: Counter[str] = Counter()
    begins = [span.begin for span in spans]
    for step in steps:
        first, last = bisect.bisect_left(begins, step.begin), bisect.bisect_left(begins, step.end)
        sums.update(owners([span for span in spans[first:last] if span.end <= step.end], step.begin, step.end))
    return sums


def _disk(recording: Recording, timed: Sequence[Step]) -> dict[str, Any]:
    """What the drive did in the timed steps."""
    steps = [(step.begin, step.end) for step in timed]
    drive = drive_of(recording.reads, recording.full_until(steps[-1][1]), steps)
    return {
        "busy_share": drive.busy / drive.wall,
        "reads_in_flight": drive.in_flight / drive.wall,
        "bytes_per_second_busy": drive.nbytes / drive.busy * 1e9 if drive.busy else None,
        "bytes_per_step": round(drive.nbytes / len(steps)),
        "idle_seconds": (drive.wall - drive.busy) / len(steps) / 1e9,
        "idle_ring_full_seconds": drive.full / len(steps) / 1e9,
    }


def _trace(title: str, recording: Recording, stages: _Stages, profiled: Sequence[Step]) -> ChromeTrace:
    """What was recorded in the profiled steps."""
    begin, end = profiled[0].begin, profiled[-1].end
    marks = [Span(STEP, f"step {number}", step.begin, step.end) for number, step in enumerate(profiled, 1)]
    inside = [span for span in recording.spans + stages.operations if begin <= span.begin and span.end <= end]
    reads = [read for read in recording.reads if read.begin < end and read.end > begin]
    levels = [level for level in recording.levels if begin <= level[0] <= end]
    return chrome_trace(title, nested(marks + inside), reads, levels)
