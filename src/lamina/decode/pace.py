"""How many tokens a draft proposes, and whether at all: chosen online from measured times. No torch.

A cycle drafts k tokens, k >= 0, in k d seconds and verifies them in a pass of T + k m seconds: T is the pass of one
token, m what each more row adds. If token i is accepted with probability S_i (all before it included), a cycle gives
1 + S_1 + ... + S_k tokens. What is wanted is the most tokens a second, so drafting goes on while the next token brings
more of them than its time would bring otherwise:

    S_(k+1) > rate (d + m)          rate: tokens a second as they come now, at least 1 / T

S is the product of each token's own probability. A draft says how sure it is; what that is worth is learned by
counting, in bins of sureness, how many were accepted.

A draft whose cycles bring less than 1 / T is paused, each time for longer, and tried again: texts change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

BINS = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 1.01)  # edges of sureness
PRIOR = 6.0  # tokens that a bin's own sureness counts as, before anything was seen
FORGET = 0.98  # of what a bin has seen, at each token it sees
SMOOTH = 0.3  # weight of a new time
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # passes
TRIAL = 3  # cycles, after which a losing draft is paused
MARGIN = 1.02  # a draft must be so much better than none


@dataclass(slots=True)
class Times:
    """Seconds, each smoothed; None while not measured.

    Attributes:
        single: of a pass of one token.
        row: what each more token adds to it; given at first, measured later.
        draft: of one drafted token.
    """

    single: float | None = None
    row: float = 0.0
    draft: float | None = None
    measured_row: bool = False
    measured_single: bool = False

    def saw_pass(self, rows: int, seconds: float) -> None:
        """A pass of `rows` tokens took so long."""
        if rows == 1:
            self.single = seconds if not self.measured_single else _smooth(self.single, seconds)
            self.measured_single = True
            return
        if not self.measured_single:  # then a pass of many says as much of it as can be known
            self.single = _smooth(self.single, max(seconds - self.row * (rows - 1), seconds / rows))
            return
        assert self.single is not None
        row = max(seconds - self.single, 0.0) / (rows - 1)
        self.row = _smooth(self.row, row)

    def saw_draft(self, tokens: int, seconds: float) -> None:
        """Drafting so many tokens took so long."""
        if tokens:
            self.draft = _smooth(self.draft, seconds / tokens)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTH * (new - old)


@dataclass(slots=True)
class Trust:
    """What a draft's sureness is worth: the share accepted, by bins."""

    accepted: list[float] = field(default_factory=lambda: [PRIOR * _middle(i) for i in range(len(BINS) - 1)])
    seen: list[float] = field(default_factory=lambda: [PRIOR] * (len(BINS) - 1))

    def __call__(self, sure: float) -> float:
        """The probability that a token is accepted, if all before it were."""
        i = _bin(sure)
        return self.accepted[i] / self.seen[i]

    def saw(self, sure: float, accepted: bool) -> None:
        """A token was verified."""
        i = _bin(sure)
        self.accepted[i] = FORGET * self.accepted[i] + accepted
        self.seen[i] = FORGET * self.seen[i] + 1

    @property
    def mean(self) -> float:
        """Of all tokens so far."""
        return sum(self.accepted) / sum(self.seen)


def _bin(sure: float) -> int:
    return next((i for i in range(len(BINS) - 2) if sure < BINS[i + 1]), len(BINS) - 2)


def _middle(i: int) -> float:
    return (BINS[i] + min(BINS[i + 1], 1.0)) / 2


class Pace:
    """Decides for one generation after the other; what it learned stays.

    Args:
        most: tokens a draft may propose.
        single: seconds of a pass, expected.
        row: seconds that each more token in a pass costs, expected.
        must: never pause.
    """

    def __init__(self, most: int, single: float | None, row: float, must: bool = False) -> None:
        self.most = most
        self.times = Times(single=single, row=row)
        self.trust = Trust()
        self.paused = 0  # passes still to come without a draft
        self.pauses = 0  # that were made
        self._pause = FIRST_PAUSE
        self._must = must
        self._tokens = self._seconds = 0.0  # of the last cycles that drafted
        self._cycles = 0
        self._product = 1.0
        self._count = 0

    @property
    def rate(self) -> float:
        """Tokens a second, as they come now."""
        plain = 1 / self.times.single if self.times.single else 0.0
        return max(self._tokens / self._seconds, plain) if self._seconds else plain

    def begins(self) -> int:
        """A cycle begins: tokens to propose at most, 0 while the draft is paused."""
        self._product, self._count = 1.0, 0
        if self.paused:
            self.paused -= 1
            return 0
        return self.most

    def go_on(self, sure: float) -> bool:
        """A token was drafted, so sure; whether to draft another one."""
        self._product *= self.trust(sure)
        self._count += 1
        if self._count >= self.most:
            return False
        cost = (self.times.draft or 0.0) + self.times.row
        return self._product * self.trust.mean > self.rate * cost

    def worth(self, sure: Sequence[float]) -> int:
        """How many of tokens that are proposed already to verify."""
        product, best = 1.0, 0
        for count, each in enumerate(sure[: self.most], 1):
            product *= self.trust(each)
            if product <= self.rate * self.times.row:
                break
            best = count
        return best

    def saw(self, sure: Sequence[float], accepted: int, drafting: float, passing: float) -> None:
        """A cycle ended.

        Args:
            sure: of the tokens that were verified.
            accepted: how many of them were right.
            drafting: seconds of the draft, with what it drafted in vain.
            passing: seconds of the pass.
        """
        for each in sure[:accepted]:
            self.trust.saw(each, True)
        if accepted < len(sure):
            self.trust.saw(sure[accepted], False)
        self.times.saw_pass(len(sure) + 1, passing)
        if not sure and not drafting:
            return
        keep = 1 - SMOOTH
        self._tokens = keep * self._tokens + 1 + accepted
        self._seconds = keep * self._seconds + drafting + passing
        self._cycles += 1
        self._judge()

    def _judge(self) -> None:
        if self._must or self._cycles < TRIAL or not self.times.single:
            return
        if self._tokens / self._seconds * self.times.single >= MARGIN:
            self._pause = max(FIRST_PAUSE, self._pause // 2)
            return
        self.paused, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self.pauses += 1
        self._cycles = TRIAL - 1  # one more losing cycle is enough next time
        self._tokens = self._seconds = 0.0
