"""A draft length for tests: how quick this machine is decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.speculative.draft_length import DraftLength


class Always(DraftLength):
    """Drafts as much as may be, and verifies whatever is proposed."""

    def begins(self) -> int:
        return self.most

    def go_on(self, confidence: float) -> bool:
        return True

    def worth(self, confidence: Sequence[float]) -> int:
        return len(confidence)
