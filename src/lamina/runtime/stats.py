"""What happened so far, as plain numbers: counts and times of passes, of answers, of speculation."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lamina.fallbacks import Fallbacks
from lamina.host import peak_resident_bytes
from lamina.runtime.engine import Engine
from lamina.sizes import format_size
from lamina.stream.experts import Counts
from lamina.stream.observe import LAMINA, timed

POSITIONS = 64  # of a draft that are counted apart
REMEMBERED = 4096  # passes whose times are kept


@dataclass(frozen=True)
class Stats:
    """What happened so far; a snapshot. Bytes and seconds.

    Attributes:
        passes: forward passes that came to their end.
        bytes_read: from disk, resident weights included.
        new_tokens: tokens that `generate` gave, all sequences together.
        tokens_per_pass: new tokens over passes within `generate`.
        seconds_per_token: median time of a decode step; where steps give several tokens, their time over their tokens.
        seconds_waiting_for_disk: the model stood still because a unit was not there yet.
        seconds_in_passes: from entering the model to leaving it.
        bytes_read_per_pass: of a decode step of one token, as planned.
        read_bytes_per_second: bytes of the decode steps over their time.
        pass_bytes_done: read for the pass under way, `pass_bytes_expected` those that it will come to.
        in_pass: a pass is under way.
        active_bytes_per_token: of the weights that one token needs, wherever they are.
        experts_routed: experts that calls were routed to, each once a call; 0 where all of them are resident.
        expert_hits: of these, how many were in the cache; `experts_prefetched` were there or on their way because the
            router of the layer before predicted them, `expert_misses` had to be read; `expert_bytes_read` in all.
        expert_hit_rate: hits over experts routed; None where there were none, 1 where all experts are resident.
        expert_bytes_per_token: of experts, read in the decode steps, over the tokens they gave.
        expert_tokens: by module, tokens that were routed to each of its experts.
        draft: what proposes tokens, `draft_reason` why this or why nothing, `draft_bytes` what it has of the memory.
        drafted_tokens: that passes verified; `accepted_tokens` of them were what the model itself chose.
        accepted_by_position: of the first token of a draft, the second and so on, the share that was right where all
            before it were.
        draft_share_of_time: of the time after the first token of an answer, what proposing took.
        fallbacks: second ways that were taken so far, each with its reason.
        read_retries: reads that the operating system refused, and that were tried once more.
    """

    passes: int
    bytes_read: int
    new_tokens: int
    tokens_per_pass: float
    seconds_per_token: float
    seconds_waiting_for_disk: float
    seconds_in_passes: float
    peak_rss_bytes: int
    memory_budget_bytes: int
    resident_bytes: int
    model_bytes: int
    bytes_read_per_pass: int
    read_bytes_per_second: float
    load_seconds: float
    time_to_first_token_seconds: float
    pass_bytes_done: int
    pass_bytes_expected: int
    in_pass: bool
    active_bytes_per_token: int
    experts_routed: int
    expert_hits: int
    experts_prefetched: int
    expert_misses: int
    expert_bytes_read: int
    expert_hit_rate: float | None
    expert_bytes_per_token: float
    expert_tokens: dict[str, tuple[int, ...]]
    draft: str
    draft_reason: str
    draft_bytes: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_by_position: tuple[float, ...]
    draft_share_of_time: float
    fallbacks: tuple[str, ...] = ()
    read_retries: int = 0

    def __repr__(self) -> str:
        """What matters, in a few lines; `dataclasses.asdict` has all of it."""
        size = format_size
        lines = [
            f"Stats: {self.passes} passes, {self.new_tokens} new tokens, {self.seconds_per_token:.3g} s a token, the "
            f"first after {self.time_to_first_token_seconds:.3g} s, loaded in {self.load_seconds:.3g} s",
            f"  read: {size(self.bytes_read)}, {size(self.bytes_read_per_pass)} in each pass, "
            f"{size(self.read_bytes_per_second)}/s; waited {self.seconds_waiting_for_disk:.3g} s for the disk of "
            f"{self.seconds_in_passes:.3g} s in passes",
            f"  memory: at most {size(self.peak_rss_bytes)} of {size(self.memory_budget_bytes)}; "
            f"{size(self.resident_bytes)} of {size(self.model_bytes)} of weights are resident",
        ]
        if self.experts_routed:
            lines.append(f"  experts: {self.experts_routed} routed to, {self.expert_hits} of them in the cache")
        if self.draft != "none":
            taken = f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted"
            lines.append(f"  draft: {self.draft}, {taken} ({self.draft_reason})")
        if self.read_retries:
            lines.append(f"  reads: {self.read_retries} failed for a moment and were tried again")
        return "\n".join([*lines, *(f"  fallback: {each}" for each in self.fallbacks)])


@dataclass
class SpeculationStats:
    """Counts and seconds over all generations of a model.

    Attributes:
        draft: which one, or "none".
        reason: why this one, or why none.
        off_because: why the last generation went without it; None where it did not.
        generations: that had it.
        paused, silent: passes without a draft: it would have cost more than it saves, or it had nothing to propose.
        cycles: passes after the first one of a generation; `verified` those that had a draft to verify.
        drafted: tokens that were verified; `accepted` of them were right.
        tried, right: by position in the draft, how often there was a token whose predecessors were right, and how
            often it was right too.
        drafting_seconds: of `seconds` of all cycles.
    """

    draft: str = "none"
    reason: str = ""
    off_because: str | None = None
    generations: int = 0
    paused: int = 0
    silent: int = 0
    cycles: int = 0
    verified: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    tried: list[int] = field(default_factory=lambda: [0] * POSITIONS)
    right: list[int] = field(default_factory=lambda: [0] * POSITIONS)
    drafting_seconds: float = 0.0
    seconds: float = 0.0

    def on(self, draft: str) -> None:
        """A generation has a draft."""
        self.draft, self.off_because = draft, None
        self.generations += 1

    def off(self, reason: str) -> None:
        """The last generation went without its draft."""
        self.off_because = reason

    def began(self, seconds: float) -> None:
        """A draft read the prompt."""
        self.drafting_seconds += seconds
        self.seconds += seconds

    def cycle(self, drafted: int, accepted: int, kept: int, drafting: float, seconds: float) -> None:
        """A pass gave `kept` tokens; of `drafted` ones it took `accepted`."""
        self.cycles += 1
        self.verified += bool(drafted)
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += kept
        self.drafting_seconds += drafting
        self.seconds += seconds
        for i in range(min(accepted, POSITIONS)):
            self.tried[i] += 1
            self.right[i] += 1
        if accepted < min(drafted, POSITIONS):
            self.tried[accepted] += 1

    @property
    def name(self) -> str:
        """What proposes tokens: "none" where the last generation went without its draft."""
        return self.draft if self.off_because is None else "none"

    @property
    def said(self) -> str:
        """Why this draft, or why the last generation had none, or why nothing was proposed."""
        if self.off_because is not None:
            return self.off_because
        return f"{self.reason}, but {self._idle}" if self.generations and not self.drafted else self.reason

    @property
    def _idle(self) -> str:
        """Why a draft that was on proposed nothing."""
        if self.silent:
            return "it found nothing to propose in this text"
        if self.paused:
            return "it would have cost more time than it saves"
        return "an answer of one token has nothing to draft"

    @property
    def accepted_by_position(self) -> tuple[float, ...]:
        """Of each position that was reached, the share that was right."""
        return tuple(right / tried for right, tried in zip(self.right, self.tried, strict=True) if tried)

    @property
    def draft_share_of_time(self) -> float:
        """Of the time after the first token, what the draft took."""
        return self.drafting_seconds / self.seconds if self.seconds else 0.0


class Meter:
    """What the passes of one model and the answers of `generate` are counted with. Bytes and seconds.

    Args:
        load_seconds: how long loading took.

    Attributes:
        passes: forward passes that came to their end.
    """

    def __init__(self, load_seconds: float) -> None:
        self.passes = 0
        self._load_seconds = load_seconds
        self._passes_in_generate = self._new_tokens = 0
        self._seconds_in_passes = self._first_token = 0.0
        self._pass_began: float | None = None
        self._pass_of: int | None = None  # the thread
        self._counting = threading.Lock()  # what several threads count together
        self._generating_now = 0
        self._generate_began: float | None = None
        self._steps: deque[float] = deque(maxlen=REMEMBERED)  # seconds from the end of one pass to the next's
        self._expert_bytes = 0.0  # read in these steps
        self._expert_bytes_before = 0
        self._last_end: float | None = None

    @property
    def in_own_pass(self) -> bool:
        """Whether a pass of the calling thread is under way."""
        return self._pass_of == threading.get_ident()

    @property
    def in_generate(self) -> bool:
        """Whether an answer is under way, in any thread."""
        return self._generate_began is not None

    def began(self) -> None:
        """A pass of the calling thread begins."""
        self._pass_began, self._pass_of = time.perf_counter(), threading.get_ident()

    @timed(LAMINA)
    def ended(self, expert_bytes: int) -> None:
        """The pass came to its end.

        Args:
            expert_bytes: of experts, read so far in all.
        """
        assert self._pass_began is not None
        now = time.perf_counter()
        self._seconds_in_passes += now - self._pass_began
        self.passes += 1
        began, before = self._generate_began, self._last_end  # another thread's answer may end meanwhile
        if began is not None:
            self._passes_in_generate += 1
            if before is None:
                self._first_token = now - began
            else:
                if len(self._steps) == REMEMBERED:
                    self._expert_bytes *= 1 - 1 / REMEMBERED
                self._steps.append(now - before)
                self._expert_bytes += expert_bytes - self._expert_bytes_before
        self._last_end, self._expert_bytes_before = now, expert_bytes

    def left(self) -> None:
        """The pass is over, however it ended."""
        self._pass_began = self._pass_of = None

    def not_counted(self) -> None:
        """The last pass was made for a message alone."""
        self.passes -= 1

    def batched(self, tokens: int) -> None:
        """A pass of a batch, which transformers runs, gave tokens."""
        self._new_tokens += tokens
        self._passes_in_generate += bool(tokens)

    def generated(self, tokens: int) -> None:
        """An answer is complete: it has so many new tokens, all sequences together."""
        self._new_tokens += tokens

    @contextmanager
    def generating(self) -> Iterator[None]:
        """An answer is under way; several threads may have one each."""
        with self._counting:
            if not self._generating_now:
                self._generate_began, self._last_end = time.perf_counter(), None
            self._generating_now += 1
        try:
            yield
        finally:
            with self._counting:
                self._generating_now -= 1
                if not self._generating_now:
                    self._generate_began = self._last_end = None

    def stats(self, engine: Engine, speculation: SpeculationStats, fallbacks: Fallbacks) -> Stats:
        """A snapshot: the counts here, with those of the engine, of speculation and of second ways."""
        plan = engine.plan
        counts = engine.experts.counts if engine.experts is not None else Counts()
        per_pass = self._new_tokens / self._passes_in_generate if self._passes_in_generate else 0.0
        step = statistics.median(self._steps) if self._steps else 0.0
        per_step = max(per_pass, 1.0)
        if speculation.verified and self._steps:  # steps are no longer alike: some give many tokens
            step, per_step = statistics.fmean(self._steps), speculation.tokens / speculation.cycles
        expert_bytes = self._expert_bytes / len(self._steps) if self._steps else 0.0
        in_pass = self._pass_began is not None
        done, expected = engine.progress() if in_pass else (0, plan.bytes_read_per_pass)
        return Stats(
            passes=self.passes,
            bytes_read=engine.readers.bytes_read,
            new_tokens=self._new_tokens,
            tokens_per_pass=per_pass,
            seconds_per_token=step / per_step,
            seconds_waiting_for_disk=engine.seconds_waiting,
            seconds_in_passes=self._seconds_in_passes,
            peak_rss_bytes=peak_resident_bytes(),
            memory_budget_bytes=plan.budget.memory_bytes,
            resident_bytes=plan.resident_bytes,
            model_bytes=plan.model_bytes,
            bytes_read_per_pass=plan.bytes_read_per_pass,
            read_bytes_per_second=(plan.bytes_streamed_per_pass + expert_bytes) / step if step else 0.0,
            load_seconds=self._load_seconds,
            time_to_first_token_seconds=self._first_token,
            pass_bytes_done=done,
            pass_bytes_expected=expected,
            in_pass=in_pass,
            active_bytes_per_token=plan.active_bytes_per_token,
            expert_hit_rate=counts.hits / counts.routed if counts.routed else plan.hit_rate_without_reading,
            expert_bytes_per_token=expert_bytes / max(per_pass, 1.0),
            draft_bytes=plan.budget.draft_bytes,
            fallbacks=tuple(fallbacks),
            read_retries=engine.readers.retries,
            **_counted(counts, speculation),
        )


def _counted(counts: Counts, speculation: SpeculationStats) -> dict[str, Any]:
    """What the stream of experts and speculation counted, by field of `Stats`."""
    return {
        "experts_routed": counts.routed,
        "expert_hits": counts.hits,
        "experts_prefetched": counts.prefetched,
        "expert_misses": counts.misses,
        "expert_bytes_read": counts.nbytes,
        "expert_tokens": {module: tuple(tokens) for module, tokens in counts.tokens.items()},
        "draft": speculation.name,
        "draft_reason": speculation.said,
        "drafted_tokens": speculation.drafted,
        "accepted_tokens": speculation.accepted,
        "accepted_by_position": speculation.accepted_by_position,
        "draft_share_of_time": speculation.draft_share_of_time,
    }
