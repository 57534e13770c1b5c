"""Which expert goes when another comes, against a slow and obvious model of the same."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.stream.expert_cache import ExpertCache, Key

COUNTS = (3, 1, 5)
KEYS = [(module, expert) for module, count in enumerate(COUNTS) for expert in range(count)]
keys = st.sampled_from(KEYS)
steps = st.one_of(
    st.tuples(st.just("take"), keys, st.sets(st.integers(0, 4))),
    st.tuples(st.just("take"), keys, st.just(set())),
    st.tuples(st.just("drop"), keys),
    st.tuples(st.just("shrink"), st.integers(0, 9)),
    st.tuples(st.just("saw"), st.integers(0, 2), st.dictionaries(st.integers(0, 4), st.integers(1, 9)),
              st.sampled_from((0, 1, 2, 9, 100, 5000))),
)  # fmt: skip


class Obvious:
    """A dictionary, and every slot that there is."""

    def __init__(self, slots: int) -> None:
        self.slots = set(range(slots))
        self.held: dict[Key, int] = {}

    @property
    def free(self) -> set[int]:
        return self.slots - set(self.held.values())


def agree(cache: ExpertCache, model: Obvious) -> None:
    assert cache.slots == len(model.slots)
    assert len(cache) == len(model.held) <= cache.slots
    assert sorted(cache.held()) == sorted(model.held)
    for key in KEYS:
        assert (key in cache) == (key in model.held)
        assert cache.slot(key) == model.held.get(key)
        assert math.isfinite(cache.worth(key))


@settings(max_examples=400, deadline=None)
@given(slots=st.integers(0, 10), script=st.lists(steps, max_size=60))
def test_any_history_is_that_of_the_obvious_model(slots: int, script: list[tuple]) -> None:  # type: ignore[type-arg]
    cache, model = ExpertCache(slots, COUNTS), Obvious(slots)
    for kind, *said in script:
        if kind == "saw":
            module, tokens, total = said
            tokens = {expert: count for expert, count in tokens.items() if expert < COUNTS[module]}
            cache.saw(module, tokens, max(total, *tokens.values(), 0) if tokens else total)
        elif kind == "drop":
            assert cache.drop(said[0]) == model.held.pop(said[0], None)
        elif kind == "shrink":
            worth = {key: cache.worth(key) for key in model.held}
            given_up = cache.shrink(said[0])
            stay = cache.held()
            gone = [key for key in model.held if key not in stay]
            assert len(gone) == max(len(model.held) - said[0], 0)
            assert not gone or not stay or max(worth[key] for key in gone) <= min(worth[key] for key in stay)
            for key in gone:
                del model.held[key]
            assert len(set(given_up)) == len(given_up) == max(len(model.slots) - said[0], 0)
            assert set(given_up) <= model.free
            model.slots -= set(given_up)
        elif said[0] not in model.held:
            key, keep = said[0], {(said[0][0], expert) for expert in said[1]}
            able = [other for other in model.held if other not in keep]
            worth = {other: cache.worth(other) for other in able}
            free = model.free
            taken = cache.take(key, keep)
            if not free and not able:
                assert taken is None
            else:
                assert taken is not None
                slot, gone = taken
                if free:
                    assert gone is None and slot in free
                else:
                    assert gone in able and worth[gone] == min(worth.values())
                    assert model.held.pop(gone) == slot
                model.held[key] = slot
        agree(cache, model)


def turns(cache: ExpertCache, module: int, *experts: int) -> None:
    for expert in experts:
        cache.saw(module, {expert: 1}, 1)


def test_what_more_tokens_go_to_is_worth_more() -> None:
    cache = ExpertCache(2, [4])
    cache.saw(0, {0: 6, 1: 3, 2: 1}, 10)
    worth = [cache.worth((0, expert)) for expert in range(4)]
    assert worth == sorted(worth, reverse=True) and len(set(worth)) == 4


def test_what_was_used_lately_is_worth_more_than_what_was_used_as_often_before() -> None:
    cache = ExpertCache(2, [2])
    turns(cache, 0, *[0] * 20, *[1] * 20)
    assert cache.worth((0, 1)) > cache.worth((0, 0))


def test_worth_is_forgotten() -> None:
    cache = ExpertCache(2, [3])
    turns(cache, 0, 0)
    before = cache.worth((0, 0))
    turns(cache, 0, *[1] * 50)
    assert cache.worth((0, 0)) < before
    turns(cache, 0, *[1, 2] * 50_000)
    assert cache.worth((0, 1)) > cache.worth((0, 0)) and math.isfinite(cache.worth((0, 0)))


def test_a_call_with_more_tokens_is_a_share_and_not_a_sum() -> None:
    """A long prompt in one layer does not make that layer's experts worth more than another's."""
    cache = ExpertCache(2, [2, 2])
    for module, tokens in ((0, 1000), (1, 2000)):
        cache.saw(module, {0: tokens, 1: tokens // 2}, tokens)
    for expert in (0, 1):
        assert cache.worth((0, expert)) == pytest.approx(cache.worth((1, expert)), abs=0.3)
    assert cache.worth((0, 0)) > cache.worth((0, 1)) + 0.5 and cache.worth((1, 0)) > cache.worth((1, 1)) + 0.5


def test_the_experts_of_every_layer_compete() -> None:
    cache = ExpertCache(2, [2, 2])
    turns(cache, 0, *[0] * 30)
    turns(cache, 1, *[1] * 30)
    assert cache.take((1, 0)) == (0, None) and cache.take((0, 0)) == (1, None)
    assert cache.take((1, 1)) == (0, (1, 0)), "the other module's unused expert"
    assert cache.take((0, 1), {(0, 0)}) == (0, (1, 1)), "though it is worth more than what had to stay"
    assert sorted(cache.held()) == [(0, 0), (0, 1)]


def test_what_was_seen_since_the_last_choice_counts_in_the_next_one() -> None:
    cache = ExpertCache(3, [1, 2, 2])
    turns(cache, 0, 0)
    turns(cache, 1, *[0] * 40)
    for key in ((0, 0), (1, 0), (2, 0)):
        assert cache.take(key) is not None
    taken = cache.take((2, 1))
    assert taken is not None and taken[1] == (2, 0)
    turns(cache, 1, *[1] * 400)
    taken = cache.take((2, 0), {(2, 1)})
    assert taken is not None and taken[1] == (1, 0)


def test_a_skewed_router_is_served_from_a_cache_of_its_favourites() -> None:
    """Hits come near those of a cache that knows the odds, where the least recently used going first gives none."""
    rng = random.Random(0)
    layers, experts, slots = 8, 32, 8 * 6
    cache = ExpertCache(slots, [experts] * layers)
    odds = [1 / (1 + rank) ** 1.5 for rank in range(experts)]
    favourites = [rng.sample(range(experts), experts) for _ in range(layers)]
    hits = tried = 0
    for token in range(600):
        for layer in range(layers):
            ranks = rng.choices(range(experts), odds, k=2)
            wanted = {favourites[layer][rank] for rank in ranks}
            cache.saw(layer, dict.fromkeys(wanted, 1), 1)
            keep = {(layer, expert) for expert in wanted}
            for key in keep:
                if token > 100:
                    tried, hits = tried + 1, hits + (key in cache)
                if key not in cache:
                    assert cache.take(key, keep) is not None
    best = sum(sorted(odds)[-6:]) / sum(odds)
    assert hits / tried > 0.75 * best
