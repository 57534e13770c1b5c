"""Counts and times of one model: its passes, the tokens they gave, and how long the decode steps took."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamina.fallbacks import Fallbacks
from lamina.host import peak_resident_bytes
from lamina.runtime.draft_stats import Record
from lamina.runtime.engine import Engine
from lamina.runtime.stats import Stats
from lamina.stream.experts import Counts

REMEMBERED = 4096  # passes whose times are kept


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
        """A pass of a batch that somebody else runs gave tokens."""
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

    def stats(self, engine: Engine, record: Record, fallbacks: Fallbacks) -> Stats:
        """A snapshot: the counts here, with those of the engine, of speculation and of second ways."""
        plan = engine.plan
        counts = engine.experts.counts if engine.experts is not None else Counts()
        per_pass = self._new_tokens / self._passes_in_generate if self._passes_in_generate else 0.0
        step = statistics.median(self._steps) if self._steps else 0.0
        per_step = max(per_pass, 1.0)
        if record.verified and self._steps:  # steps are no longer alike: some give many tokens
            step, per_step = statistics.fmean(self._steps), record.tokens / record.cycles
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
            **_of_experts(counts),
            **_of_drafts(record),
        )


def _of_experts(counts: Counts) -> dict[str, Any]:
    """What the stream of experts counted, by field of `Stats`."""
    return {
        "experts_routed": counts.routed,
        "expert_hits": counts.hits,
        "experts_foreseen": counts.foreseen,
        "expert_misses": counts.misses,
        "expert_bytes_read": counts.nbytes,
        "expert_tokens": {module: tuple(tokens) for module, tokens in counts.tokens.items()},
    }


def _of_drafts(record: Record) -> dict[str, Any]:
    """What speculation counted, by field of `Stats`."""
    return {
        "draft": record.name,
        "draft_reason": record.said,
        "drafted_tokens": record.drafted,
        "accepted_tokens": record.accepted,
        "accepted_by_position": record.accepted_by_position,
        "draft_share_of_time": record.draft_share_of_time,
    }
