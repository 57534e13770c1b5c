"""With a draft the same tokens come out as without one, whatever is asked of `generate`; only the passes are fewer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from helpers.always import Always
from helpers.tiny import write_llama
from lamina import AutoModel
from lamina.speculative.decoder import MOST, Speculator
from lamina.speculative.draft import GoOn, Pick, Proposal
from lamina.speculative.draft_length import TRIAL, DraftLength

IDS = torch.tensor([[5, 99, 23, 77, 5, 99, 23, 77, 5, 99, 23]])
NEW = 48


class Oracle:
    """Knows the answer, and is wrong now and then: a draft without a model."""

    name = "oracle"

    def __init__(self, answer: list[int], wrong: Callable[[int], bool]) -> None:
        self.answer, self.wrong = answer, wrong

    def begin(self, prompt: list[int], cache: Any) -> str | None:
        return None

    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        proposal = Proposal()
        for at in range(len(text), min(len(text) + most, len(self.answer))):
            token = self.answer[at]
            proposal.tokens.append((token + 1) % 300 if self.wrong(at) else token)
            proposal.confidence.append(0.999)
        return proposal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose texts neither repeat at once nor end by themselves."""
    folder = tmp_path_factory.mktemp("speculation")
    return write_llama(folder, seed=3, spread=0.25, vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PreTrainedModel]:
    with (model := AutoModel.from_pretrained(str(folder), dtype=torch.float32, draft="lookup")).lamina:
        yield model


def with_oracle(model: PreTrainedModel, answer: list[int], wrong: Callable[[int], bool]) -> Speculator:
    speculator: Speculator = model.lamina.decoder
    speculator._drafts["oracle"] = Oracle(answer, wrong), Always(MOST, None, 0.0, must=True)
    return speculator


def both(model: PreTrainedModel, **asked: Any) -> tuple[Any, Any, int]:
    """What comes without a draft and with one that is right twice of three times; and the passes of the latter."""
    inputs = {"inputs": IDS, "max_new_tokens": NEW, "do_sample": False, **asked}

    def generate(**more: Any) -> Any:
        torch.manual_seed(7)
        return model.generate(**{**inputs, **more, "stopping_criteria": copy.deepcopy(asked.get("stopping_criteria"))})

    plain = generate(draft=None)
    ids = plain if isinstance(plain, torch.Tensor) else plain.sequences
    with_oracle(model, ids[0].tolist(), lambda at: at % 3 == 0)
    before = model.lamina.stats.passes
    drafted = generate(draft="oracle", exact=True)  # to the bit: a near-tie would decide a race the other way
    return plain, drafted, model.lamina.stats.passes - before


class Counted(Oracle):
    """Counts how often it is asked."""

    asked = 0

    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        self.asked += 1
        return super().propose(text, most, go_on, pick)


def test_a_paused_draft_is_tried_again(model: PreTrainedModel) -> None:
    """Passes without a draft, while it is paused, are not held against it."""
    plain = model.generate(IDS, max_new_tokens=90, do_sample=False, draft=None)[0].tolist()
    draft, length = Counted(plain, lambda at: True), DraftLength(MOST, None, 0.0)
    model.lamina.decoder._drafts["oracle"] = draft, length
    out = model.generate(IDS, max_new_tokens=90, do_sample=False, draft="oracle")
    assert out[0].tolist() == plain
    assert length.pauses >= 2
    assert draft.asked > 2 * TRIAL - 1


def test_a_draft_with_nothing_to_say_loses_nothing(model: PreTrainedModel) -> None:
    draft, length = Counted([], lambda at: True), DraftLength(MOST, None, 0.0)
    model.lamina.decoder._drafts["oracle"] = draft, length
    model.generate(IDS, max_new_tokens=30, do_sample=False, draft="oracle")
    assert (length.pauses, draft.asked) == (0, 28)  # the first token is the prefill's, the last one has no room


class Every(LogitsProcessor):
    """Remembers how often it was asked: a draft must not ask it."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return scores.roll(self.asked, -1)


class After(StoppingCriteria):
    """Ends a text at so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), input_ids.shape[1] >= self.length)


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "top-k, top-p": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "min-p, typical": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated bigram": {"no_repeat_ngram_size": 2, "do_sample": True},
    "at least": {"min_new_tokens": 20, "eos_token_id": list(range(0, 320, 5))},
    "ends within a draft": {"eos_token_id": list(range(0, 320, 9))},
    "a criterion within a draft": {"stopping_criteria": [After(27)]},
    "attention mask": {"attention_mask": torch.tensor([[0, 0, *[1] * 9]])},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("name", ASKED)
def test_the_same_tokens_in_fewer_passes(model: PreTrainedModel, name: str) -> None:
    plain, drafted, passes = both(model, **ASKED[name])
    if not isinstance(plain, torch.Tensor):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.scores, drafted.scores, strict=True))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.logits, drafted.logits, strict=True))
        held = plain.past_key_values.get_seq_length(), drafted.past_key_values.get_seq_length()
        assert held[0] == held[1]
        plain, drafted = plain.sequences, drafted.sequences
    assert torch.equal(plain, drafted)
    new = plain.shape[1] - IDS.shape[1]
    assert passes <= 2 + new // 2


def test_a_processor_with_a_memory_is_asked_once_a_token(model: PreTrainedModel) -> None:
    counts = []
    for draft in (None, "lookup"):
        every = Every()
        out = model.generate(IDS, max_new_tokens=NEW, do_sample=False, logits_processor=[every], draft=draft)
        counts.append((every.asked, out.tolist()))
    assert counts[0] == counts[1]


def test_the_generator_of_random_numbers_ends_where_it_would(model: PreTrainedModel) -> None:
    both(model, do_sample=True)
    drafted = torch.get_rng_state()
    torch.manual_seed(7)
    model.generate(IDS, max_new_tokens=NEW, do_sample=True, draft=None)
    assert torch.equal(drafted, torch.get_rng_state())


def test_sampling_keeps_the_distribution(model: PreTrainedModel) -> None:
    """Second tokens over many seeds, after a draft that proposes the likeliest: against their exact distribution."""
    asked = {"do_sample": True, "temperature": 1.5, "top_k": 8}
    with torch.no_grad():
        first = int(model(IDS).logits[0, -1].argmax())
        prompt = torch.cat([IDS, torch.tensor([[first]])], 1)
        logits = model(prompt).logits[0, -1] / asked["temperature"]
    kept = torch.topk(logits, 8)
    expected = torch.softmax(kept.values, 0)
    likely = [*prompt[0].tolist(), *kept.indices[:1].tolist() * 4]
    with_oracle(model, likely, lambda at: False)
    seen = torch.zeros(320)
    runs = 400
    for seed in range(runs):
        torch.manual_seed(seed)
        # the first new token comes of the prefill, the second is the one that was drafted
        out = model.generate(IDS, max_new_tokens=3, draft="oracle", **asked)
        if int(out[0, IDS.shape[1]]) == first:
            seen[int(out[0, IDS.shape[1] + 1])] += 1
    total = seen.sum()
    assert total > 40
    assert seen.sum() == seen[kept.indices].sum()
    chi_square = float((((seen[kept.indices] - total * expected) ** 2) / (total * expected)).sum())
    assert chi_square < 24.3  # 7 degrees of freedom, one run in a thousand; the seeds are fixed
