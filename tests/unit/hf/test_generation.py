"""Which calls decode as they always did, which may have a draft, and what goes around transformers' own loop."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation import LogitsProcessorList, StopStringCriteria
from transformers.generation.stopping_criteria import MaxLengthCriteria

from helpers.families import tiny_config
from lamina import AutoModel
from lamina.hf.decoding import generation
from lamina.speculative.draft import GoOn, Pick, Proposal
from lamina.speculative.draft_length import Pace

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


def letters() -> PreTrainedTokenizerFast:
    """Token i is the character `LETTERS[i]`."""
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("door")
    config = tiny_config("llama")
    config.vocab_size, config.eos_token_id = 64, None
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(str(folder), device="cpu", context=64, draft="lookup")


# -- the processors that a draft follows


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
    assert set(generation.FOLLOWED) <= set(kinds)
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for kind in generation.FOLLOWED:
        first = kinds[kind](IDS, scores.clone())
        kinds[kind](torch.tensor([[9, 9, 9, 1]]), scores.flip(-1))
        assert torch.equal(kinds[kind](IDS, scores.clone()), first), kind
        assert not torch.equal(first, scores), kind


# -- which calls decode as they always did

PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "beams"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beams"),
    "beams of a config": ({"generation_config": GenerationConfig(num_beams=3)}, "beams"),
    "several sequences": ({"num_return_sequences": 2, "do_sample": True}, "several sequences"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "token by token"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "token by token"),
    "a static cache": ({"cache_implementation": "static"}, "static cache"),
    "a quantized cache": ({"cache_implementation": "quantized"}, "quantized cache"),
    "no cache": ({"use_cache": False}, "no cache"),
    "an assistant": ({"assistant_model": object()}, "assistant_model of its own"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens of its own"),
    "another way": ({"custom_generate": lambda *_, **__: None}, "custom_generate of its own"),
}
DRAFTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "inputs": {"inputs": IDS, "max_new_tokens": 4, "attention_mask": torch.ones_like(IDS)},
    "greedy": {"do_sample": False, "num_beams": 1, "num_return_sequences": 1},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "a dynamic cache": {"cache_implementation": "dynamic"},
    "a config": {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=3)},
    "no beams, against the config": {"generation_config": GenerationConfig(num_beams=3), "num_beams": 1},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "stop strings": {"stop_strings": ["w5"], "tokenizer": None},
}


@pytest.mark.parametrize("name", PLAIN)
def test_why_a_call_decodes_as_it_always_did(model: PreTrainedModel, name: str) -> None:
    request, why = PLAIN[name]
    said = generation.why_plain(model, request)
    assert said is not None and why in said
    assert "\n" not in said


@pytest.mark.parametrize("name", DRAFTED)
def test_calls_that_may_have_a_draft(model: PreTrainedModel, name: str) -> None:
    assert generation.why_plain(model, DRAFTED[name]) is None


def test_asking_leaves_the_call_as_it_is(model: PreTrainedModel) -> None:
    config = GenerationConfig(num_beams=3)
    before = config.to_dict()
    request = {"generation_config": config, "temperature": 0.5, "do_sample": True}
    generation.why_plain(model, request)
    assert config.to_dict() == before
    assert set(request) == {"generation_config", "temperature", "do_sample"}
    assert model.generation_config.num_beams in (None, 1)


def test_stop_strings_of_the_models_own_config(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "stop_strings", ["w5"])
    said = generation.why_plain(model, {})
    assert said is not None and "stop strings" in said
    assert generation.why_plain(model, {"stop_strings": ["w6"]}) is None


@pytest.mark.parametrize("name", ["beams", "several sequences", "no cache", "hidden states"])
def test_the_reason_is_told_and_the_answer_is_the_same(model: PreTrainedModel, name: str) -> None:
    request, why = PLAIN[name]
    answers = []
    for draft in (None, "lookup"):
        torch.manual_seed(1)
        out = model.generate(IDS, max_new_tokens=4, pad_token_id=0, draft=draft, **request)
        answers.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*answers)
    assert why in model.lamina.stats.draft_reason


# -- what transformers would lose on the way


def test_the_streamer_stays_in_the_call_and_is_given_back() -> None:
    streamer = Streamer()
    given = {"streamer": streamer, "max_new_tokens": 3}
    request, found = generation.taken_out(given)
    assert found is streamer
    assert request == given
    assert request is not given
    assert generation.taken_out({"max_new_tokens": 3}) == ({"max_new_tokens": 3}, None)


def test_stop_strings_become_a_criterion() -> None:
    mine = MaxLengthCriteria(99)
    given = {"stop_strings": ["w5"], "tokenizer": letters(), "stopping_criteria": StoppingCriteriaList([mine])}
    request, _ = generation.taken_out(given)
    assert set(request) == {"stopping_criteria"}
    first, second = request["stopping_criteria"]
    assert first is mine
    assert isinstance(second, StopStringCriteria)
    assert len(given["stopping_criteria"]) == 1


def test_stop_strings_of_a_config_become_a_criterion() -> None:
    config = GenerationConfig(stop_strings=["w5"], max_new_tokens=3)
    request, _ = generation.taken_out({"generation_config": config, "tokenizer": letters()})
    assert request["generation_config"].stop_strings is None
    assert request["generation_config"].max_new_tokens == 3
    assert config.stop_strings == ["w5"]
    assert len(request["stopping_criteria"]) == 1


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass tokenizer=model"):
        generation.taken_out({"stop_strings": "w5"})


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
    model.lamina.decoder._drafts["known"] = Known(answer), Pace(31, None, 0.0, must=True)
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
