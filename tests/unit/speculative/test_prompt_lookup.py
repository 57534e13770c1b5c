"""The lookup draft proposes what followed before, goes on after an edit, and its confidence follows its evidence."""

from __future__ import annotations

import random

import pytest

from lamina.speculative.draft import Draft, Proposal
from lamina.speculative.ngrams import LEVELS, STEPS, Index
from lamina.speculative.prompt_lookup import Lookup


def go_on(confidence: float) -> bool:
    return True


def pick(position: int, logits: object) -> tuple[int, float]:
    raise AssertionError("a lookup has no logits")


def after(prompt: list[int], answer: list[int], most: int = 8) -> Proposal:
    """What is proposed once the answer has come a token at a time."""
    draft = Lookup()
    draft.begin(prompt, None)
    for end in range(len(answer)):
        draft.propose(prompt + answer[:end], most, go_on, pick)
    return draft.propose(prompt + answer, most, go_on, pick)


SOURCE = list(range(100, 160))


def test_it_is_a_draft() -> None:
    draft: Draft = Lookup()
    assert draft.name == "lookup"


def test_what_followed_before_is_copied() -> None:
    found = after(SOURCE, [1, 2, 110, 111, 112])
    assert found.tokens == list(range(113, 121))
    assert len(found.confidence) == 8 and all(0 < c < 1 for c in found.confidence)


def test_nothing_is_proposed_where_nothing_came_before() -> None:
    assert after(SOURCE, [1, 2, 3]) == Proposal()
    assert after([], [5]) == Proposal()
    assert after([5], []) == Proposal()


@pytest.mark.parametrize("most", [1, 3, 16])
def test_no_more_than_asked_for(most: int) -> None:
    assert len(after(SOURCE, [110, 111, 112], most).tokens) == most


def test_the_longest_match_wins_then_the_latest() -> None:
    long = [11, 12, 13, 14, 15, 16, 70]
    assert after([*long, 3, 15, 16, 80, 4], [12, 13, 14, 15, 16], 1).tokens == [70]
    assert after([1, 2, 3, 70, 9, 1, 2, 3, 80, 8], [1, 2, 3], 1).tokens == [80]


def test_a_period_is_copied_past_the_end_of_the_text() -> None:
    assert after([], [1, 2, 3, 1, 2, 3], 8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def confidence(followers: list[int]) -> float:
    """The confidence of the first token, where 1 2 3 was followed by each of these before."""
    prompt = [token for i, follower in enumerate(followers) for token in (1000 + i, 1, 2, 3, follower)]
    draft = Lookup()
    draft.begin(prompt, None)
    return draft.propose([*prompt, 5, 1, 2, 3], 1, go_on, pick).confidence[0]


def test_places_that_agree_make_it_surer_and_places_that_do_not_less_sure() -> None:
    assert confidence([7, 8]) < confidence([7]) < confidence([7, 7]) < confidence([7, 7, 7])
    assert confidence([6, 7, 8, 9]) < confidence([7, 8])


def test_a_longer_match_is_surer() -> None:
    lengths = [after(SOURCE, [1, *SOURCE[10 : 10 + n]], 1).confidence[0] for n in (2, 4, 8, 16)]
    assert lengths == sorted(set(lengths))
    assert lengths[0] < 0.9 < lengths[-1]


@pytest.mark.parametrize(
    ("edit", "goes_on"),
    [([1], 121), ([120, 1], 122), ([1, 2, 120], 121), ([122], 123), ([125], 126)],
    ids=["replaced", "replaced later", "inserted", "deleted two", "deleted five"],
)
def test_a_copy_goes_on_after_an_edit(edit: list[int], goes_on: int) -> None:
    found = after(SOURCE, [*SOURCE[5:20], *edit])
    assert found.tokens[:4] == [goes_on, goes_on + 1, goes_on + 2, goes_on + 3]


def test_a_long_insertion_does_not_lose_the_place() -> None:
    found = after(SOURCE, [*SOURCE[5:20], *range(1, 40), 120])
    assert found.tokens[:3] == [121, 122, 123]


def test_after_an_edit_the_inserted_place_is_the_other_continuation() -> None:
    draft = Lookup()
    draft.begin(SOURCE, None)
    ways = draft.continuations(SOURCE, 4)
    assert ways == []
    draft.propose([*SOURCE, *SOURCE[5:20]], 8, go_on, pick)
    ways = draft.continuations([*SOURCE, *SOURCE[5:20], 1], 4, 3)
    assert {tuple(way.tokens) for way in ways} == {(121, 122, 123), (120, 121, 122)}
    first = [way.confidence[0] for way in ways]
    assert first == sorted(first, reverse=True)
    assert len(draft.continuations([*SOURCE, *SOURCE[5:20], 1], 1, 3)) == 1


def test_a_place_that_no_token_supports_yet_is_a_mere_guess() -> None:
    assert (
        after(SOURCE, [*SOURCE[5:20], 1]).confidence[0] < 0.2 < 0.4 < after(SOURCE, [*SOURCE[5:20], 120]).confidence[0]
    )


def test_a_place_is_forgotten_in_the_end() -> None:
    assert after(SOURCE, [*SOURCE[5:20], *range(200, 320)]) == Proposal()


def test_another_place_is_followed_where_the_text_goes_there() -> None:
    other = list(range(300, 340))
    found = after([*SOURCE, *other], [*SOURCE[5:20], *other[4:20], 1])
    assert found.tokens[:3] == [321, 322, 323]


NAMED = [t for i in range(100, 150, 5) for t in (i, i + 1, i + 2, i + 3, i + 4, 5)]  # the name is 5


def renamed(names: list[list[int]]) -> list[int]:
    """`NAMED`, with these in place of its first names."""
    return [t for i, name in enumerate(names) for t in [*range(100 + 5 * i, 105 + 5 * i), *name]]


@pytest.mark.parametrize("name", [[6], [5, 6], [6, 7, 8]], ids=["another", "longer", "three tokens"])
def test_a_rename_is_done_again(name: list[int]) -> None:
    answer = [*renamed([name] * 4), 120, 121, 122]
    expected = [123, 124, *name, 125, 126]
    assert after(NAMED, answer, len(expected)).tokens == expected


def test_after_an_edit_done_again_the_copy_goes_on_and_is_sure() -> None:
    found = after(NAMED, [*renamed([[5, 6]] * 4), 120, 121, 122, 123, 124, 5, 6], 4)
    assert found.tokens == [125, 126, 127, 128]
    assert found.confidence[0] > 0.5


def test_an_edit_that_was_left_undone_is_given_up() -> None:
    expected = [137, 138, 139, 5, 140]
    assert after(NAMED, [*renamed([*[[5]] * 6, [6]]), 135, 136], 5).tokens == expected
    assert after(NAMED, [*renamed([[6], *[[5]] * 6]), 135, 136], 5).tokens == expected


def test_where_its_guesses_fail_it_is_less_sure() -> None:
    pairs = [token for i in range(40) for token in (1, 2, 3, 1000 + i)]
    draft = Lookup()
    draft.begin([1, 2, 3, 999], None)
    seen = []
    for end in range(0, len(pairs), 4):
        seen.append(draft.propose([1, 2, 3, 999, *pairs[: end + 3]], 1, go_on, pick).confidence[0])
    assert seen[-1] < seen[0] / 2


def brute(tokens: list[int]) -> list[tuple[int, int]]:
    found = []
    for at in range(1, len(tokens)):
        length = 0
        while length < min(at, 32) and tokens[at - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= LEVELS[0]:
            found.append((at, length))
    return sorted(found, key=lambda match: (-match[1], -match[0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_match_is_found(seed: int) -> None:
    rng = random.Random(seed)
    text: list[int] = []
    index = Index()
    for _ in range(150):
        begin = rng.randrange(len(text) + 1)
        new = [*text[begin : begin + rng.randrange(12)], rng.randrange(200)]
        text += new
        index.extend(new)
        expected, got = brute(text), index.matches()
        assert got[:1] == expected[:1]
        assert set(got) <= set(expected)


def test_a_proposal_looks_at_few_places_however_long_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    same = Index.same

    def counted(self: Index, at: int, end: int, most: int = 32) -> int:
        nonlocal calls
        calls += 1
        return same(self, at, end, most)

    monkeypatch.setattr(Index, "same", counted)
    index = Index()
    index.extend([1, 2] * 5000)
    index.matches()
    assert 0 < calls <= STEPS * len(LEVELS)


def test_a_prompt_that_begins_like_the_last_text_takes_its_index() -> None:
    rng = random.Random(0)
    first = [rng.randrange(50) for _ in range(3000)]
    again, fresh = Lookup(), Lookup()
    again.begin(first, None)
    again.propose([*first, *first[100:140]], 4, go_on, pick)
    second = [*first[:2500], *first[7:400]]
    again.begin(second, None)
    fresh.begin(second, None)
    assert again._index.tokens == fresh._index.tokens
    assert again.propose([*second, 1], 8, go_on, pick) == fresh.propose([*second, 1], 8, go_on, pick)
    for end in range(2, len(second)):
        again._index.truncate(len(second) - end + 1)
        fresh._index.truncate(len(second) - end + 1)
        assert again._index.matches() == fresh._index.matches()


def test_a_shared_prefix_is_not_indexed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Lookup()
    draft.begin(SOURCE * 20, None)
    added: list[int] = []
    extend = Index.extend
    monkeypatch.setattr(Index, "extend", lambda self, tokens: (added.append(len(tokens)), extend(self, tokens))[1])
    draft.begin([*SOURCE * 20, 1, 2, 3], None)
    draft.begin([*SOURCE * 19, 4], None)
    assert added == [3, 1]


def test_the_index_takes_at_most_forty_bytes_a_token() -> None:
    draft = Lookup()
    for length in (1025, 2048, 5000):
        draft.begin([length + i % 700 for i in range(length)], None)
        assert draft.nbytes <= 40 * length + 20


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_text_a_proposal_is_whole(seed: int) -> None:
    rng = random.Random(seed)
    draft, text = Lookup(), [rng.randrange(6) for _ in range(30)]
    draft.begin(text, None)
    for _ in range(300):
        begin = rng.randrange(len(text))
        copied = text[begin : begin + rng.randrange(1, 14)]
        edit = rng.randrange(len(copied))
        copied[edit : edit + rng.randrange(4)] = [rng.randrange(9) for _ in range(rng.randrange(4))]
        text += copied
        most = rng.randrange(1, 12)
        for way in draft.continuations(text, 3, most):
            assert 1 <= len(way.tokens) == len(way.confidence) <= most
            assert all(0 < confidence < 1 for confidence in way.confidence)
        draft.propose(text, most, go_on, pick)
    assert draft._edits


def test_a_deletion_is_done_again() -> None:
    source = [1, 2, 3, 4, 99, 98, 5, 6, 7, 8, 99, 98, 9, 10, 11]
    found = after(source, [0, 1, 2, 3, 4, 5, 6], 5)
    assert found.tokens == [7, 8, 9, 10, 11]
    assert found.confidence[2] < found.confidence[1]


def test_a_shorter_text_begins_anew() -> None:
    draft = Lookup()
    draft.begin(SOURCE, None)
    draft.propose([*SOURCE, *SOURCE[:20]], 4, go_on, pick)
    assert draft.propose([1, 2, 3, 1, 2], 2, go_on, pick).tokens == [3, 1]
