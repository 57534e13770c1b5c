"""How many tokens a draft proposes, and whether at all: chosen online from measured times. No torch.

A cycle drafts k tokens, k >= 0, in k d seconds and verifies them in a pass of T + k m seconds: T is the pass of one
token, m what each more row adds. If token i is accepted with probability S_i (all before it included), a cycle gives
1 + S_1 + ... + S_k tokens. What is wanted is the most tokens a second, so drafting continues while the next token
brings more of them than its time would bring otherwise:

    S_(k+1) > rate (d + m)          rate: tokens a second as they come now, at least 1 / T

S is the product of each token's own probability. A draft gives a confidence for each token; what that is worth is
learned by counting, in bins of confidence, how many were accepted.

A draft whose cycles bring less than 1 / T is paused, each time for longer, and tried again: texts change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BINS = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 1.01)  # edges of confidence
PRIOR = 4.0  # tokens that what is expected counts as
FIRST_MEAN = 0.9  # of a draft's tokens are right
FORGET = 0.98  # of what a bin has seen, at each token it sees
SMOOTH = 0.1  # weight of a new pass
LEARN = 0.3  # of what was seen of the cost of rows: lengths become alike and would show it no more
QUICKLY = 0.3  # of a new cycle
STIFF = 30.0  # variance of rows from which on the slope that was seen counts more than the expected one
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # passes
SLOWLY = 0.1  # of a new cycle, where it is judged whether drafts pay: three of them may all be unlucky
TRIAL = 5  # cycles, after which a losing draft is paused
FIRST = 7  # tokens of the very first draft: passes of two lengths show what a row costs
MARGIN = 1.02  # a draft must be so much better than none


@dataclass(slots=True)
class Times:
    """Seconds of passes and drafts. A pass of n tokens is taken to last `single + (n - 1) row`: a line through those
    that were seen, the last ones most, drawn towards the expected slope while their lengths are much the same.

    Attributes:
        expected_single: of a pass of one token, before any was seen; None where it is unknown.
        expected_row: what each more token is expected to add; learned, as long as passes of several lengths come.
        draft: of one drafted token; None while none was.
    """

    expected_single: float | None = None
    expected_row: float = 0.0
    draft: float | None = None
    _weight: float = 0.0
    _rows: float = 0.0  # weighted means
    _seconds: float = 0.0
    _spread: float = 0.0  # weighted variance of the rows, and their covariance with the seconds
    _together: float = 0.0

    @property
    def row(self) -> float:
        """What each more token adds to a pass."""
        if not self._weight:
            return self.expected_row
        slope = (self._together + STIFF * self.expected_row) / (self._spread + STIFF)
        return min(max(slope, 0.0), self._seconds / self._rows)

    @property
    def known(self) -> bool:
        """Whether any pass was seen."""
        return self._weight > 0

    @property
    def single(self) -> float | None:
        """A pass of one token."""
        if not self._weight:
            return self.expected_single
        return self._seconds - self.row * (self._rows - 1)

    def saw_pass(self, rows: int, seconds: float) -> None:
        """A pass of `rows` tokens took so long."""
        self._weight = (1 - SMOOTH) * self._weight + 1
        share = 1 / self._weight
        off_rows, off_seconds = rows - self._rows, seconds - self._seconds
        self._rows += share * off_rows
        self._seconds += share * off_seconds
        keep = 1 - share
        self._spread = keep * (self._spread + share * off_rows * off_rows)
        self._together = keep * (self._together + share * off_rows * off_seconds)
        self.expected_row += LEARN * (self.row - self.expected_row)

    def saw_draft(self, tokens: int, seconds: float) -> None:
        """Drafting so many tokens took so long."""
        if tokens:
            each = seconds / tokens
            self.draft = each if self.draft is None else self.draft + QUICKLY * (each - self.draft)


@dataclass(slots=True)
class Trust:
    """What a draft's confidence is worth: the share accepted, by bins.

    Attributes:
        expected: the same before anything was seen.
    """

    expected: Callable[[float], float]
    accepted: list[float] = field(init=False)
    seen: list[float] = field(default_factory=lambda: [PRIOR] * (len(BINS) - 1))
    mean: float = FIRST_MEAN  # of all tokens, the last ones most

    def __post_init__(self) -> None:
        self.accepted = [PRIOR * self.expected(_middle(i)) for i in range(len(BINS) - 1)]

    def __call__(self, confidence: float) -> float:
        """The probability that a token is accepted, if all before it were."""
        i = _bin(confidence)
        return float(self.accepted[i] / self.seen[i])

    def saw(self, confidence: float, accepted: bool) -> None:
        """A token was verified."""
        i = _bin(confidence)
        self.accepted[i] = FORGET * self.accepted[i] + accepted
        self.seen[i] = FORGET * self.seen[i] + 1
        self.mean += (1 - FORGET) * (accepted - self.mean)


def _bin(confidence: float) -> int:
    return next((i for i in range(len(BINS) - 2) if confidence < BINS[i + 1]), len(BINS) - 2)


def _middle(i: int) -> float:
    return (BINS[i] + min(BINS[i + 1], 1.0)) / 2


def as_it_says(confidence: float) -> float:
    """What is expected of a draft that knows how likely it is right, or of another model."""
    return confidence


def as_a_copy(confidence: float) -> float:
    """What is expected of a copy of the target: where it is undecided, the target mostly decides for the same token."""
    return float(1 - 0.6 * (1 - confidence) ** 1.5)


class DraftLength:
    """Decides for one generation after the other; what it learned stays.

    Args:
        most: tokens a draft may propose.
        single: seconds of a pass, expected.
        row: seconds that each more token in a pass costs, expected.
        expected: how likely a token is accepted with such a confidence.
        must: never pause.
    """

    def __init__(
        self,
        most: int,
        single: float | None,
        row: float,
        expected: Callable[[float], float] = as_it_says,
        must: bool = False,
    ) -> None:
        self.most = most
        self.times = Times(single, row)
        self.trust = Trust(expected)
        self.paused = 0  # passes still to come without a draft
        self.pauses = 0  # that were made
        self._pause = FIRST_PAUSE
        self._must = must
        self._tokens = self._seconds = 0.0  # of the last cycles that drafted
        self._judged_tokens = self._judged_seconds = 0.0  # of more of them
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
        return self.most if self.times.known or self._must else min(FIRST, self.most)

    def go_on(self, confidence: float) -> bool:
        """A token was drafted with this confidence; whether to draft another one."""
        self._product *= self.trust(confidence)
        self._count += 1
        if self._count >= self.most:
            return False
        cost = (self.times.draft or 0.0) + self.times.row
        return self._product * self.trust.mean > self.rate * cost

    def worth(self, confidence: Sequence[float]) -> int:
        """How many of tokens that are proposed already to verify."""
        product, best = 1.0, 0
        for count, each in enumerate(confidence[: self.most], 1):
            product *= self.trust(each)
            if product <= self.rate * self.times.row:
                break
            best = count
        return best

    def saw(self, confidence: Sequence[float], accepted: int, drafting: float, passing: float) -> None:
        """A cycle ended.

        Args:
            confidence: of the tokens that were verified.
            accepted: how many of them were right.
            drafting: seconds of the draft, with what it drafted in vain.
            passing: seconds of the pass.
        """
        for each in confidence[:accepted]:
            self.trust.saw(each, True)
        if accepted < len(confidence):
            self.trust.saw(confidence[accepted], False)
        self.times.saw_pass(len(confidence) + 1, passing)
        if not confidence and not drafting:
            return
        tokens, seconds = 1 + accepted, drafting + passing
        self._tokens = (1 - QUICKLY) * self._tokens + tokens
        self._seconds = (1 - QUICKLY) * self._seconds + seconds
        self._judged_tokens = (1 - SLOWLY) * self._judged_tokens + tokens
        self._judged_seconds = (1 - SLOWLY) * self._judged_seconds + seconds
        self._cycles += 1
        self._judge()

    def _judge(self) -> None:
        if self._must or self._cycles < TRIAL or not self.times.single:
            return
        if self._judged_tokens / self._judged_seconds * self.times.single >= MARGIN:
            self._pause = max(FIRST_PAUSE, self._pause // 2)
            return
        self.paused, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self.pauses += 1
        self._cycles = 0
        self._tokens = self._seconds = self._judged_tokens = self._judged_seconds = 0.0
