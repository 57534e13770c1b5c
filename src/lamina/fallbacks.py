"""Second ways: what Lamina does where the first way is closed, said once, with its reason.

A second way gives the same numbers, but costs something: time, memory, drafts. So it is never taken in silence: it
stands in `lamina plan` and in `model.lamina.stats.fallbacks`, and a caller from Python gets a `FallbackWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

LONGEST_CAUSE = 140  # letters of another library's error


class FallbackWarning(UserWarning):
    """Lamina took a second way; the text says which and why."""


class Fallbacks:
    """The second ways that one model took, each reported once.

    Args:
        silent: keep them without a warning: the caller shows them.
    """

    def __init__(self, silent: bool = False) -> None:
        self._said: dict[str, None] = {}
        self._silent = silent

    def say(self, reasons: str | Iterable[str]) -> None:
        """Keep one or more, and warn of those that are new."""
        for reason in (reasons,) if isinstance(reasons, str) else reasons:
            if reason in self._said:
                continue
            self._said[reason] = None
            if not self._silent:
                warnings.warn(reason, FallbackWarning, stacklevel=2)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._said))


def cause(error: BaseException) -> str:
    """What an error of another library says: its kind and its first words."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_CAUSE:
        text = text[:LONGEST_CAUSE].rsplit(" ", 1)[0].rstrip(".,:;") + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
