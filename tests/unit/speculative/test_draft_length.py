"""How many tokens a draft may propose: with made-up seconds, so that what is chosen is held against what is best."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from lamina.speculative.draft_length import (
    FIRST,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    TRIAL,
    DraftLength,
    Times,
    Trust,
    as_a_copy,
    as_it_says,
)

MOST = 31


@dataclass(frozen=True)
class Machine:
    """Seconds of a pass of one token, of each more row in it, and of a drafted token."""

    single: float = 0.9
    row: float = 0.001
    draft: float = 0.04

    def cycle(self, length: DraftLength, right: Sequence[bool], confidence: float) -> tuple[int, int, float]:
        """Tokens that were verified, that were right, and seconds.

        Args:
            right: of the draft's tokens, in order; as long as `length.most` at least.
        """
        drafted = 0
        if most := length.begins():
            drafted = 1
            while length.go_on(confidence) and drafted < most:
                drafted += 1
            length.times.saw_draft(drafted, drafted * self.draft)
        verified = length.worth([confidence] * drafted)
        accepted = next((i for i in range(verified) if not right[i]), verified)
        passing = self.single + verified * self.row
        length.saw([confidence] * verified, accepted, drafted * self.draft, passing)
        return verified, accepted, drafted * self.draft + passing

    def generate(self, length: DraftLength, right: Sequence[bool], confidence: float = 0.9) -> tuple[float, list[int]]:
        """Tokens a second of a whole text, and the length of each draft."""
        at, seconds, lengths = 0, 0.0, []
        while at < len(right) - MOST:
            verified, accepted, took = self.cycle(length, right[at:], confidence)
            lengths.append(verified)
            at, seconds = at + accepted + 1, seconds + took
        return at / seconds, lengths

    def fixed(self, right: Sequence[bool], length: int) -> float:
        """Tokens a second with drafts of one length."""
        at, seconds = 0, 0.0
        while at < len(right) - MOST:
            accepted = next((i for i in range(length) if not right[at + i]), length)
            at, seconds = at + accepted + 1, seconds + self.single + length * (self.row + self.draft)
        return at / seconds

    def best(self, right: Sequence[bool]) -> float:
        """Of all lengths, and of none."""
        return max(self.fixed(right, length) for length in range(MOST + 1))


def text(acceptance: Callable[[int], float], tokens: int = 4000, seed: int = 0) -> list[bool]:
    """Of each place in a text, whether the draft knows it."""
    chance = random.Random(seed)
    return [chance.random() < acceptance(i) for i in range(tokens)]


# -- the line through the times of passes


def test_the_line_of_pass_times_is_found() -> None:
    times = Times(expected_single=5.0, expected_row=0.0)
    for i in range(60):
        rows = 1 + 31 * (i % 2)
        times.saw_pass(rows, 0.7 + 0.02 * (rows - 1))
    assert times.single == pytest.approx(0.7, rel=0.1)
    assert times.row == pytest.approx(0.02, rel=0.3)  # 240 of variance against 30 of what was expected


def test_what_was_expected_holds_while_all_passes_are_alike() -> None:
    times = Times(expected_single=None, expected_row=0.05)
    assert times.single is None
    for _ in range(40):
        times.saw_pass(9, 1.4)
    assert times.row == pytest.approx(0.05)
    assert times.single == pytest.approx(1.0)


def test_noise_makes_no_row_cheaper_than_nothing_nor_a_pass() -> None:
    falling = Times(1.0, 0.0)
    rising = Times(1.0, 0.0)
    for i in range(40):
        rows = 1 + 31 * (i % 2)
        falling.saw_pass(rows, 1.0 - 0.02 * (rows - 1))
        rising.saw_pass(rows, 0.001 + 1.0 * (rows - 1))
    assert falling.row == 0.0
    assert rising.single is not None and rising.single > 0


def test_times_follow_a_machine_that_becomes_slower() -> None:
    times = Times(1.0, 0.0)
    for _ in range(40):
        times.saw_pass(1, 1.0)
    for _ in range(40):
        times.saw_pass(1, 2.0)
    assert times.single == pytest.approx(2.0, rel=0.05)


def test_the_seconds_of_a_drafted_token() -> None:
    times = Times()
    times.saw_draft(0, 0.3)
    assert times.draft is None
    for _ in range(20):
        times.saw_draft(8, 0.4)
    assert times.draft == pytest.approx(0.05)


# -- what confidence is worth


def test_trust_is_learned_by_bins() -> None:
    trust = Trust(as_it_says)
    before = trust(0.6)
    for i in range(400):
        trust.saw(0.97, i % 10 != 0)  # right nine times of ten
        trust.saw(0.1, False)
    assert trust(0.97) == pytest.approx(0.9, abs=0.05)
    assert trust(0.96) == trust(0.97)  # one bin
    assert trust(0.1) < 0.02
    assert trust(0.6) == before  # of which nothing was seen
    assert trust.mean == pytest.approx(0.45, abs=0.1)


def test_trust_forgets() -> None:
    trust = Trust(as_it_says)
    for _ in range(400):
        trust.saw(0.9, True)
    for _ in range(200):
        trust.saw(0.9, False)
    assert trust(0.9) < 0.05


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.95, 0.99, 1.0])
def test_every_confidence_has_a_bin(confidence: float) -> None:
    for expected in (as_it_says, as_a_copy):
        assert 0.0 <= Trust(expected)(confidence) <= 1.0


def test_a_copy_that_wavers_is_trusted_more_than_it_says() -> None:
    assert Trust(as_a_copy)(0.4) > Trust(as_it_says)(0.4)


def test_only_what_was_reached_is_learned() -> None:
    length = DraftLength(MOST, 1.0, 0.0)
    before = length.trust(0.1)
    length.saw([0.9, 0.9, 0.1], 1, 0.1, 1.0)  # the second was wrong: of the third nothing is known
    assert length.trust(0.1) == before
    assert length.trust(0.9) != Trust(as_it_says)(0.9)


# -- how long drafts become


def test_a_draft_that_always_agrees_becomes_as_long_as_may_be() -> None:
    _, lengths = Machine().generate(DraftLength(MOST, 0.9, 0.0), [True] * 2000)
    assert lengths[-10:] == [MOST] * 10


def test_a_draft_that_is_never_right_is_paused_soon_and_for_longer_each_time() -> None:
    machine, length = Machine(), DraftLength(MOST, 0.9, 0.0)
    rate, lengths = machine.generate(length, [False] * 600)
    tried = [i for i, length in enumerate(lengths) if length]
    assert rate > 0.98 / machine.single
    assert tried[:TRIAL] == list(range(TRIAL))
    pauses = [b - a - 1 for a, b in itertools.pairwise(tried) if b - a > 1]
    assert pauses[0] == FIRST_PAUSE
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    assert length.pauses >= len(pauses)


def test_a_draft_comes_back_when_it_begins_to_be_right() -> None:
    machine, length = Machine(), DraftLength(MOST, 0.9, 0.0)
    machine.generate(length, [False] * 400)
    rate, lengths = machine.generate(length, [True] * 1500)
    assert lengths.index(next(filter(None, lengths))) <= LONGEST_PAUSE
    assert lengths[-5:] == [MOST] * 5
    assert rate > 3 / machine.single


def test_a_draft_that_must_go_on_is_never_paused() -> None:
    length = DraftLength(MOST, 0.9, 0.0, must=True)
    for _ in range(50):
        assert length.begins() == MOST
        length.saw([0.9] * 4, 0, 1.0, 1.0)
    assert length.pauses == 0


def test_a_forecast_that_nobody_has_is_measured() -> None:
    right = text(lambda i: 0.9)
    rate, _ = Machine().generate(DraftLength(MOST, None, 0.0), right)
    assert rate > 0.9 * Machine().best(right)


# -- what is worth its rows


def test_worth_keeps_nothing_where_a_row_costs_more_than_it_brings() -> None:
    dear = DraftLength(MOST, 1.0, 0.95)
    assert dear.worth([0.9] * 8) == 0
    cheap = DraftLength(MOST, 1.0, 0.0)
    assert cheap.worth([0.9] * 8) == 8
    assert cheap.worth([]) == 0


def test_worth_stops_where_sureness_does() -> None:
    length = DraftLength(MOST, 1.0, 0.3)
    assert length.worth([0.97, 0.97, 0.1, 0.97, 0.97]) == 2


def test_no_more_than_the_most() -> None:
    assert DraftLength(3, 1.0, 0.0).worth([0.99] * 10) == 3
    length = DraftLength(3, 1.0, 0.0)
    assert length.begins() == 3
    assert [length.go_on(0.999) for _ in range(3)] == [True, True, False]


def test_experts_that_cost_nearly_a_pass_a_row_are_not_drafted_for() -> None:
    """Each token of the draft is routed to experts of its own: a row is nearly a pass."""
    machine = Machine(single=1.0, row=0.7, draft=0.0)
    length = DraftLength(MOST, 1.0, 0.7)
    right = text(lambda i: 0.6, 1500)
    rate, lengths = machine.generate(length, right, confidence=0.6)
    assert sum(lengths) < 0.05 * len(lengths)
    assert rate > 0.97 / machine.single


@pytest.mark.parametrize("draft", [0.0, 0.01, 0.05])
@pytest.mark.parametrize(("row", "share"), [(0.05, 0.93), (0.1, 0.93), (0.7, 0.85)])
@pytest.mark.parametrize("acceptance", [0.6, 0.9])
def test_that_rows_are_dearer_than_expected_is_learned(
    draft: float, row: float, share: float, acceptance: float
) -> None:
    """And kept: drafts become alike in length then, so that passes alone would show it no more."""
    machine, right = Machine(single=1.0, row=row, draft=draft), text(lambda i: acceptance, 2500)
    rate, _ = machine.generate(DraftLength(MOST, 1.0, 0.0), right, confidence=acceptance)
    assert rate > share * machine.best(right)


def test_that_rows_are_cheaper_than_expected_is_learned() -> None:
    machine, right = Machine(single=1.0, row=0.01, draft=0.01), text(lambda i: 0.9, 2500)
    rate, _ = machine.generate(DraftLength(MOST, 1.0, 0.3), right)
    assert rate > 0.9 * machine.best(right)


def test_the_first_draft_is_short_so_that_two_lengths_are_seen() -> None:
    length = DraftLength(MOST, 1.0, 0.0)
    assert length.begins() == FIRST
    length.saw([0.9] * FIRST, FIRST, 0.1, 1.0)
    assert length.begins() == MOST
    assert DraftLength(3, 1.0, 0.0).begins() == 3


def test_a_lookup_costs_next_to_nothing_on_a_text_that_never_repeats() -> None:
    """Tokens cost no time to propose and rows a little: what is proposed in vain may take a few percent."""
    length, chance, seconds = DraftLength(MOST, 1.0, 0.0), random.Random(1), 0.0
    passes = 1000
    for _ in range(passes):
        found = chance.random() < 0.3  # n-grams that came before, and went on otherwise
        confidence = [0.5 * 0.9**i for i in range(8)] if length.begins() and found else []
        verified = length.worth(confidence)
        passing = 1.0 + 0.01 * verified
        length.saw(confidence[:verified], 0, 0.0005, passing)
        seconds += 0.0005 + passing
    assert seconds < 1.03 * passes


# -- whole generations: as good as the best length, which nobody knows beforehand


@pytest.mark.parametrize(
    ("acceptance", "share"),
    [(0.97, 0.95), (0.9, 0.97), (0.8, 0.97), (0.6, 0.97), (0.4, 0.97), (0.3, 0.95), (0.1, 0.94)],
    ids=lambda each: str(each),
)
@pytest.mark.parametrize("expected", [as_it_says, as_a_copy])
def test_nearly_as_quick_as_the_best_fixed_length(
    acceptance: float, share: float, expected: Callable[[float], float]
) -> None:
    machine, right = Machine(), text(lambda i: acceptance)
    rate, _ = machine.generate(DraftLength(MOST, 0.9, 0.0, expected), right)
    assert rate > share * machine.best(right)


def test_a_forecast_that_is_far_off_does_not_matter() -> None:
    machine, right = Machine(), text(lambda i: 0.9)
    for wrong in (0.05, 20.0):
        rate, _ = machine.generate(DraftLength(MOST, wrong, 0.0), right)
        assert rate > 0.93 * machine.best(right), wrong


def test_a_change_halfway_is_followed() -> None:
    """From 0.97 to 0.6 and back: as quick as if each part had its own best length."""
    machine = Machine()
    parts = [text(lambda i, a=a: a, 2000, seed) for seed, a in enumerate((0.97, 0.6, 0.97))]
    best = sum(map(len, parts)) / sum(len(part) / machine.best(part) for part in parts)
    rate, _ = machine.generate(DraftLength(MOST, 0.9, 0.0), [each for part in parts for each in part])
    assert rate > 0.92 * best


def test_how_sure_it_is_beats_any_fixed_length() -> None:
    """Stretches that a draft knows and stretches where it guesses, and it knows which: no one length is right."""
    machine, length = Machine(), DraftLength(MOST, 0.9, 0.0)
    easy = [(i // 50) % 2 == 0 for i in range(6000)]
    right = text(lambda i: 0.995 if easy[i] else 0.4, len(easy))
    at, seconds = 0, 0.0
    while at < len(right) - MOST:
        drafted, most, going = 0, length.begins(), True
        confidence: list[float] = []
        while going and drafted < most:
            confidence.append(0.995 if easy[at + drafted] else 0.4)
            drafted += 1
            going = length.go_on(confidence[-1])
        length.times.saw_draft(drafted, drafted * machine.draft)
        confidence = confidence[: length.worth(confidence)]
        accepted = next((i for i in range(len(confidence)) if not right[at + i]), len(confidence))
        passing = machine.single + len(confidence) * machine.row
        length.saw(confidence, accepted, drafted * machine.draft, passing)
        at, seconds = at + accepted + 1, seconds + passing + drafted * machine.draft
    assert at / seconds > 1.15 * machine.best(right)
