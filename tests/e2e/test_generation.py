"""What goes around transformers' own loop: a call with a draft answers as one without, and says why it has none."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList

from helpers.tiny import letters, write_llama
from lamina import AutoModel
from lamina.hf.decoding import custom_generate
from lamina.speculative.draft import GoOn, Pick, Proposal
from lamina.speculative.draft_length import DraftLength

LETTERS = string.ascii_letters + string.digits + "+/"
IDS = torch.tensor([[5, 9, 23, 17, 5, 9, 23]])


class Streamer:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.seen.append(torch.tensor([-1]))


class Known:
    """Proposes an answer that is known beforehand, all of it at once."""

    name = "known"

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def begin(self, prompt: list[int], cache: Any) -> str | None:
        return None

    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        tokens = self.answer[len(text) : len(text) + most]
        return Proposal(tokens, [0.999] * len(tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    fields = {"vocab_size": len(LETTERS), "pad_token_id": 0, "bos_token_id": 1}
    return write_llama(tmp_path_factory.mktemp("door"), seed=5, spread=0.3, tokenizer=letters(LETTERS), **fields)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PreTrainedModel]:
    with (model := AutoModel.from_pretrained(str(folder), device="cpu", context=64, draft="lookup")).lamina:
        yield model


REQUESTS: dict[str, Any] = {
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "min_length": 20,
    "min_new_tokens": 20,
    "min_p": 0.01,
    "bad_words_ids": [[3], [9, 23]],
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.5,
    "suppress_tokens": [1, 2],
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "typical_p": 0.9,
}


def test_the_processors_that_a_draft_follows_remember_nothing(model: PreTrainedModel) -> None:
    """Asked about another text meanwhile, as a draft asks, they say what they would have said."""
    seen: list[LogitsProcessorList] = []

    def look(model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: Any) -> torch.Tensor:
        seen.append(logits_processor)
        return input_ids

    for name, value in REQUESTS.items():
        asked = {name: value, "do_sample": True, "eos_token_id": 7, "max_new_tokens": 30}
        model.generate(IDS, custom_generate=look, draft=None, **asked)
    kinds = {type(each): each for processors in seen for each in processors}
    assert set(custom_generate.FOLLOWED) <= set(kinds)
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for kind in custom_generate.FOLLOWED:
        first = kinds[kind](IDS, scores.clone())
        kinds[kind](torch.tensor([[9, 9, 9, 1]]), scores.flip(-1))
        assert torch.equal(kinds[kind](IDS, scores.clone()), first), kind
        assert not torch.equal(first, scores), kind


PLAIN: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "token by token": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("why", PLAIN)
def test_the_reason_is_told_and_the_answer_is_the_same(model: PreTrainedModel, why: str) -> None:
    answers = []
    for draft in (None, "lookup"):
        torch.manual_seed(1)
        out = model.generate(IDS, max_new_tokens=4, pad_token_id=0, draft=draft, **PLAIN[why])
        answers.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*answers)
    assert why in model.lamina.stats.draft_reason


def test_a_stop_string_ends_a_text_within_a_draft(model: PreTrainedModel) -> None:
    answer = model.generate(IDS, max_new_tokens=24, do_sample=False, draft=None)[0].tolist()
    new = answer[IDS.shape[1] :]
    at = next(i for i in range(6, 20) if new[i] not in new[:i])  # a letter that comes first there
    asked = {
        "max_new_tokens": 24,
        "do_sample": False,
        "stop_strings": [LETTERS[new[at - 1]] + LETTERS[new[at]]],
        "tokenizer": model.tokenizer,
    }
    plain = model.generate(IDS, draft=None, **asked)
    model.lamina.decoder._drafts["known"] = Known(answer), DraftLength(31, None, 0.0, must=True)
    before = model.lamina.stats.passes
    streamer = Streamer()
    drafted = model.generate(IDS, draft="known", streamer=streamer, **asked)
    assert torch.equal(plain, drafted)
    assert plain.shape[1] == IDS.shape[1] + at + 1
    assert model.lamina.stats.passes - before == 2  # the prompt, and one draft in which the text ends
    assert torch.cat([each.flatten() for each in streamer.seen]).tolist() == [*drafted[0].tolist(), -1]


def test_stop_strings_are_found_with_the_models_own_tokenizer(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = model.generate(IDS, max_new_tokens=24, do_sample=False, draft=None)[0].tolist()
    new = answer[IDS.shape[1] :]
    at = next(i for i in range(6, 20) if new[i] not in new[:i])
    asked = {"max_new_tokens": 24, "do_sample": False}
    ended = [model.generate(IDS, draft=draft, stop_strings=LETTERS[new[at]], **asked) for draft in (None, "lookup")]
    monkeypatch.setattr(model.generation_config, "stop_strings", [LETTERS[new[at]]])
    ended.append(model.generate(IDS, draft=None, **asked))
    assert [each[0].tolist() for each in ended] == [answer[: IDS.shape[1] + at + 1]] * 3
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(IDS, draft=None, **asked)


def test_the_same_stop_string_by_a_config(model: PreTrainedModel) -> None:
    answer = model.generate(IDS, max_new_tokens=24, do_sample=False, draft=None)[0].tolist()
    config = GenerationConfig(stop_strings=[LETTERS[answer[12]]], max_new_tokens=24, do_sample=False)
    asked = {"generation_config": config, "tokenizer": model.tokenizer}
    plain, drafted = (model.generate(IDS, draft=draft, **asked) for draft in (None, "lookup"))
    assert torch.equal(plain, drafted)
    assert plain.shape[1] <= 13
