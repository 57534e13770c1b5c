"""What speculation did so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

POSITIONS = 64  # of a draft that are told apart


@dataclass
class Record:
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
