"""Sampling as a race: the tokens of `torch.multinomial`, previewed by a draft, the generator left where it would be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation import LogitsProcessorList

from lamina.speculative.sampling import Greedy, Preview, Sampled, choice_for

VOCABULARY = 50
TEXT = torch.tensor([[4, 8, 15]])


def scores(seed: int, forbidden: int = 0) -> torch.Tensor:
    """Of shape (1, vocabulary); the first `forbidden` tokens cannot be chosen."""
    made = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    made[:, :forbidden] = -torch.inf
    return made


def of_torch(steps: list[torch.Tensor], seed: int = 3) -> tuple[list[int], torch.Tensor]:
    """Tokens as transformers samples them, and the generator's state at the end."""
    torch.manual_seed(seed)
    drawn = [int(torch.multinomial(torch.softmax(each, -1), 1)) for each in steps]
    return drawn, torch.get_rng_state()


@pytest.mark.parametrize("forbidden", [0, 1, 40, VOCABULARY - 1])
def test_taken_as_torch_samples(forbidden: int) -> None:
    steps = [scores(seed, forbidden) for seed in range(200)]
    expected, state = of_torch(steps)
    torch.manual_seed(3)
    choice = Sampled(TEXT)
    assert [int(choice.take(each)) for each in steps] == expected
    choice.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert min(expected) >= forbidden


def test_a_token_of_the_text_has_one_dimension() -> None:
    for choice in (Greedy(), Sampled(TEXT)):
        assert choice.take(scores(0)).shape == (1,)


@pytest.mark.parametrize("forbidden", [0, 40])
def test_what_is_previewed_is_taken_where_the_scores_are_equal(forbidden: int) -> None:
    steps = [scores(seed, forbidden) for seed in range(60)]
    expected, state = of_torch(steps)
    torch.manual_seed(3)
    choice, taken = Sampled(TEXT), []
    while len(taken) < len(steps):
        ahead = steps[len(taken) : len(taken) + 7]
        previewed = [choice.preview(i, each)[0] for i, each in enumerate(ahead)]
        kept = [int(choice.take(each)) for each in ahead[: 1 + len(taken) % 5]]  # the rest was drafted in vain
        assert previewed[: len(kept)] == kept
        taken += kept
    choice.close()
    assert taken[: len(steps)] == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_previewing_again_gives_the_same() -> None:
    choice = Sampled(TEXT)
    first = [choice.preview(i, scores(i)) for i in range(5)]
    assert [choice.preview(i, scores(i)) for i in range(5)] == first


def test_nothing_taken_leaves_the_generator_where_it_was() -> None:
    before = torch.get_rng_state()
    choice = Sampled(TEXT)
    choice.preview(5, scores(0))
    assert not torch.equal(torch.get_rng_state(), before)
    choice.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_closed_at_once_nothing_happens() -> None:
    before = torch.get_rng_state()
    Sampled(TEXT).close()
    Greedy().close()
    assert torch.equal(torch.get_rng_state(), before)


def test_alike_distributions_mostly_choose_alike() -> None:
    """A draft that is off by a little previews most tokens; drawn apart, two like these agree one time in five."""
    torch.manual_seed(0)
    choice, alike, apart = Sampled(TEXT), 0, 0
    for seed in range(300):
        target = scores(seed)
        draft = target + 0.1 * scores(seed + 1000)
        token, _ = choice.preview(0, draft)
        alike += token == int(choice.take(target))
        apart += token == int(choice.take(target))
    assert alike > 0.8 * 300
    assert apart < 0.4 * 300


@pytest.mark.parametrize("choice", [Greedy(), Sampled(TEXT)], ids=["greedy", "sampled"])
def test_sure_is_from_nothing_to_one(choice: Greedy | Sampled) -> None:
    certain = torch.full((1, VOCABULARY), -torch.inf)
    certain[0, 7] = 1.0
    assert choice.preview(0, certain) == (7, 1.0)
    for seed in range(50):
        _, confidence = choice.preview(0, scores(seed))
        assert 0.0 <= confidence <= 1.0 and not math.isnan(confidence)


def test_greedy_is_as_sure_as_the_largest_probability() -> None:
    each = scores(1)
    token, confidence = Greedy().preview(3, each)
    assert token == int(Greedy().take(each)) == int(each.argmax())
    assert confidence == pytest.approx(float(torch.softmax(each, -1).max()), rel=1e-5)


def test_which_choice() -> None:
    assert isinstance(choice_for(True, TEXT), Sampled)
    assert isinstance(choice_for(False, TEXT), Greedy)


# -- a draft's tokens, chosen with the processors of the text


class Counting(LogitsProcessor):
    """Remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return scores.flip(-1)


def preview(processors: list[LogitsProcessor], vocabulary: int = VOCABULARY) -> Preview:
    return Preview(LogitsProcessorList(processors), Greedy(), TEXT, vocabulary)


def peaks(*tokens: int) -> torch.Tensor:
    """Logits of shape (vocabulary,) that prefer these tokens, the first one most."""
    logits = torch.zeros(VOCABULARY)
    for i, token in enumerate(tokens):
        logits[token] = 10.0 - i
    return logits


def test_a_penalty_for_repeating_sees_what_was_drafted() -> None:
    pick = preview([RepetitionPenaltyLogitsProcessor(5.0)])
    assert pick(0, peaks(8, 20))[0] == 20  # 8 is in the text
    assert pick(1, peaks(20, 21))[0] == 21  # 20 was drafted
    assert pick(2, peaks(22, 23))[0] == 22
    assert pick(1, peaks(22, 23))[0] == 22  # what was drafted from there on is gone
    assert pick(2, peaks(22, 23))[0] == 23


def test_the_text_itself_is_left_as_it_is() -> None:
    before = TEXT.clone()
    pick = preview([RepetitionPenaltyLogitsProcessor(5.0), TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)])
    logits = peaks(8, 20)
    for position in range(4):
        pick(position, logits)
    assert torch.equal(TEXT, before)
    assert torch.equal(logits, peaks(8, 20))


def test_a_processor_with_a_memory_is_not_asked() -> None:
    counting = Counting()
    assert preview([counting])(0, peaks(20))[0] == 20
    assert counting.asked == 0


@pytest.mark.parametrize(
    ("processors", "change"),
    [
        ([TemperatureLogitsWarper(2.0)], lambda confidence: confidence < 0.8),
        ([TopKLogitsWarper(1)], lambda confidence: confidence == 1.0),
    ],
    ids=["temperature", "top-k"],
)
def test_warpers_change_how_sure_it_is(processors: list[LogitsProcessor], change: Callable[[float], bool]) -> None:
    assert preview([])(0, peaks(20, 21))[1] == pytest.approx(0.73, abs=0.02)
    logits = peaks(20, 21)
    token, confidence = preview(processors)(0, logits)
    assert token == 20
    assert change(confidence)


def test_a_padded_vocabulary_is_cut() -> None:
    logits = torch.cat([peaks(20), torch.full((14,), 99.0)])
    assert preview([])(0, logits)[0] == 20


def test_a_shorter_vocabulary_is_padded() -> None:
    token, _ = preview([RepetitionPenaltyLogitsProcessor(5.0)], VOCABULARY + 14)(0, peaks(20) - 100)
    assert token == 20
    pick = Preview(LogitsProcessorList(), Sampled(TEXT), TEXT, VOCABULARY + 14)
    assert all(pick(i, torch.zeros(VOCABULARY))[0] < VOCABULARY for i in range(40))


def test_logits_in_16_bits_are_chosen_in_32() -> None:
    token, confidence = preview([])(0, peaks(20, 21).to(torch.bfloat16))
    assert token == 20
    assert confidence == pytest.approx(0.73, abs=0.02)
