"""Which calls decode as they always did, which may have a draft, and what is taken out of a call before."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, TextStreamer
from transformers.generation import StopStringCriteria
from transformers.generation.stopping_criteria import MaxLengthCriteria

from helpers.families import tiny_model
from helpers.tiny import letters
from lamina.hf.decoding import custom_generate

LETTERS = string.ascii_letters + string.digits + "+/"
IDS = torch.tensor([[5, 9, 23, 17, 5, 9, 23]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


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


class Diffusing(GenerationConfig):
    """Of a model that does not go token by token: no mode of transformers' fits, and it says so."""

    def get_generation_mode(self, *_: Any) -> Any:
        raise NotImplementedError("does not support `get_generation_mode`")


def test_a_model_with_a_way_of_its_own_decodes_as_it_always_did(model: PreTrainedModel) -> None:
    assert "way of its own" in str(custom_generate.why_plain(model, {"generation_config": Diffusing()}))


@pytest.mark.parametrize("name", PLAIN)
def test_why_a_call_decodes_as_it_always_did(model: PreTrainedModel, name: str) -> None:
    request, why = PLAIN[name]
    said = custom_generate.why_plain(model, request)
    assert said is not None and why in said
    assert "\n" not in said


@pytest.mark.parametrize("name", DRAFTED)
def test_calls_that_may_have_a_draft(model: PreTrainedModel, name: str) -> None:
    assert custom_generate.why_plain(model, DRAFTED[name]) is None


def test_asking_leaves_the_call_as_it_is(model: PreTrainedModel) -> None:
    config = GenerationConfig(num_beams=3)
    before = config.to_dict()
    request = {"generation_config": config, "temperature": 0.5, "do_sample": True}
    custom_generate.why_plain(model, request)
    assert config.to_dict() == before
    assert set(request) == {"generation_config", "temperature", "do_sample"}
    assert model.generation_config.num_beams in (None, 1)


def test_stop_strings_of_the_models_own_config(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "stop_strings", ["w5"])
    said = custom_generate.why_plain(model, {})
    assert said is not None and "stop strings" in said
    assert custom_generate.why_plain(model, {"stop_strings": ["w6"]}) is None


# -- what transformers would lose on the way


def test_the_streamer_stays_in_the_call_and_is_given_back() -> None:
    streamer = TextStreamer(letters(LETTERS))
    given = {"streamer": streamer, "max_new_tokens": 3}
    request, found = custom_generate.taken_out(given)
    assert found is streamer
    assert request == given
    assert request is not given
    assert custom_generate.taken_out({"max_new_tokens": 3}) == ({"max_new_tokens": 3}, None)


def test_stop_strings_become_a_criterion() -> None:
    mine = MaxLengthCriteria(99)
    given = {"stop_strings": ["w5"], "tokenizer": letters(LETTERS), "stopping_criteria": StoppingCriteriaList([mine])}
    request, _ = custom_generate.taken_out(given)
    assert set(request) == {"stopping_criteria"}
    first, second = request["stopping_criteria"]
    assert first is mine
    assert isinstance(second, StopStringCriteria)
    assert len(given["stopping_criteria"]) == 1


def test_stop_strings_of_a_config_become_a_criterion() -> None:
    config = GenerationConfig(stop_strings=["w5"], max_new_tokens=3)
    request, _ = custom_generate.taken_out({"generation_config": config, "tokenizer": letters(LETTERS)})
    assert request["generation_config"].stop_strings is None
    assert request["generation_config"].max_new_tokens == 3
    assert config.stop_strings == ["w5"]
    assert len(request["stopping_criteria"]) == 1


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass tokenizer=model"):
        custom_generate.taken_out({"stop_strings": "w5"})
