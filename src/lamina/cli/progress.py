"""What the status line says: the stage of loading, then the pass that is under way."""

from __future__ import annotations

from typing import Any

from lamina.cli.live import now
from lamina.sizes import format_rate, format_seconds, format_size

_STAGES = {
    "download": "downloading",
    "load": "loading",
    "check": "checking what is there",
    "split": "splitting",
    "verify": "verifying",
    "wait": "waiting for another process that writes the same folder",
}


class StatusLine:
    """Gathers the numbers: `report` is called while loading, `watch` gives the model whose passes then count."""

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._stage: tuple[str, int, int] = ("starting", 0, 0)
        self._stage_began = now()
        self._stage_from = 0  # bytes that were there when it began
        self._model: Any = None
        self._tokens = 0
        self._pass = -1
        self._pass_began = now()
        self.note: str | None = None  # said instead of the numbers while it is set

    def report(self, stage: str, done: int, total: int) -> None:
        """The `progress` argument of `from_pretrained`: bytes done of `total` in `stage`."""
        if stage != self._stage[0]:
            self._stage_began, self._stage_from = now(), done
        self._stage = (stage, done, total)

    def watch(self, model: Any) -> None:
        """From here on, passes of this model are what is shown."""
        self._model = model

    def begin(self) -> None:
        """A new answer begins."""
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """So many new tokens have come."""
        self._tokens += tokens

    def describe(self) -> list[str]:
        """The parts of the status line, most important first."""
        if self.note is not None:
            return [self.note]
        if self._model is None:
            stage, done, total = self._stage
            return _moving(_STAGES.get(stage, stage), done, total, now() - self._stage_began, self._stage_from)
        stats = self._model.lamina.stats
        if stats.passes != self._pass:
            self._pass, self._pass_began = stats.passes, now()
        elapsed = now() - self._pass_began
        if not self._tokens:
            return _moving("reading the prompt", stats.pass_bytes_done, stats.pass_bytes_expected, elapsed)
        parts = [_share(f"token {self._tokens + 1}", stats.pass_bytes_done, stats.pass_bytes_expected)]
        if stats.seconds_per_token:
            left = (self._max_new_tokens - self._tokens) * stats.seconds_per_token
            parts += [f"{stats.seconds_per_token:.2f} s/token", f"at most {format_seconds(left)} left"]
        return parts + _rate(stats.pass_bytes_done, elapsed)


def _moving(name: str, done: int, total: int, elapsed: float, before: int = 0) -> list[str]:
    parts = [_share(name, done, total)]
    if total <= 0:
        return parts
    parts.append(f"{format_size(done)} of {format_size(total)}")
    if rate := _rate(done - before, elapsed):
        parts += [*rate, f"{format_seconds(max(total - done, 0) * elapsed / (done - before))} left"]
    return parts


def _share(name: str, done: int, total: int) -> str:
    return f"{name} {min(done / total, 1):.0%}" if total > 0 else name


def _rate(done: int, elapsed: float) -> list[str]:
    return [format_rate(done / elapsed)] if done > 0 and elapsed > 0.5 else []
