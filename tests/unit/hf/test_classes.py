"""The class of a checkpoint's model: the one that its config names, where transformers has it for such a config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from helpers.families import tiny_config
from lamina.errors import UnsupportedError
from lamina.hf.building.classes import FAILS, model_class


def chosen(family: str, architectures: Any) -> str:
    config = tiny_config(family)
    config.architectures = architectures
    return model_class(config).__name__


NAMED = {
    "llama": "LlamaForCausalLM LlamaModel LlamaForSequenceClassification LlamaForTokenClassification",
    "bert": "BertModel BertForMaskedLM BertForSequenceClassification BertForTokenClassification BertForPreTraining",
    "t5": "T5ForConditionalGeneration T5EncoderModel T5Model",
    "bart": "BartForConditionalGeneration BartForCausalLM BartForSequenceClassification",
    "gemma3": "Gemma3ForConditionalGeneration Gemma3Model",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration WhisperForAudioClassification",
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in NAMED.items() for name in names.split()]
)
def test_a_config_names_its_class(family: str, name: str) -> None:
    assert chosen(family, [name]) == name


def test_the_first_name_counts() -> None:
    assert chosen("bert", ("BertForTokenClassification", "BertModel")) == "BertForTokenClassification"


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_a_text_class_over_a_composite_config(name: str) -> None:
    assert chosen("qwen3_5", [name]) == name


def test_a_text_class_of_another_config_over_a_composite_one() -> None:
    assert chosen("llava", ["LlamaForCausalLM"]) == "LlavaForConditionalGeneration"


NO_CLASSES = [
    None, [], (), 5, "GPT2Model", {"GPT2Model": 1}, [None], [5], [["GPT2Model"]], [""], ["NoSuchModel"],
    ["pipeline"], ["__class__"], ["__name__"], ["models"], ["models.gpt2"], ["AutoModel"], ["GPT2Config"],
    ["GPT2Tokenizer"], ["GenerationMixin"], ["PreTrainedModel"], ["GPT2PreTrainedModel"], ["LlamaPreTrainedModel"],
    ["LlamaForCausalLM"], ["os.system"], ["GPT2Model\n"], ["gpt2model"],
]  # fmt: skip


@pytest.mark.parametrize("architectures", NO_CLASSES, ids=repr)
def test_what_names_no_class_of_such_a_config_falls_back(architectures: Any) -> None:
    assert chosen("gpt2", architectures) == "GPT2LMHeadModel"


MAPPED = {
    "llama": "LlamaForCausalLM",  # a class for text comes first, as ever
    "bert": "BertLMHeadModel",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "whisper": "WhisperForCausalLM",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "vit": "ViTModel",
    "wav2vec2": "Wav2Vec2ForCTC",
    "distilbert": "DistilBertForSequenceClassification",
}


@pytest.mark.parametrize("family", MAPPED)
def test_a_config_that_names_none(family: str) -> None:
    assert chosen(family, None) == MAPPED[family]


class OddConfig(PreTrainedConfig):
    model_type = "odd_one"


@pytest.mark.parametrize("architectures", [None, ["OddModel"], ["LlamaForCausalLM"], ["PreTrainedModel"]])
def test_a_config_that_transformers_has_no_model_for(architectures: Any) -> None:
    config = OddConfig()
    config.architectures = architectures
    with pytest.raises(UnsupportedError, match=f"^transformers {transformers.__version__} has no model for odd_one$"):
        model_class(config)


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ImportError("it needs\n   timm\nwhich is not there")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", fails)
    with pytest.raises(UnsupportedError) as caught:
        chosen("llama", None)
    assert str(caught.value) == "llama needs a package that is not installed: it needs timm which is not there"
    assert chosen("llama", ["LlamaForCausalLM"]) == "LlamaForCausalLM"


def test_what_transformers_says_of_a_config_that_it_cannot_use_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("hidden_size is odd")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", fails)
    with pytest.raises(ValueError, match="hidden_size is odd"):
        chosen("llama", None)


def test_a_class_whose_passes_fail_does_so_still() -> None:
    """`FAILS` names what is broken in the installed version, and nothing that works again."""
    for kind, version in FAILS:
        if not transformers.__version__.startswith(version):
            continue
        model = getattr(transformers, kind)(tiny_config("llama4"))
        with pytest.raises(AttributeError):
            model(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_text_model_is_taken_in_place_of_one_that_fails() -> None:
    if not any(transformers.__version__.startswith(version) for _, version in FAILS):
        assert model_class(tiny_config("llama4")).__name__
        return
    config = tiny_config("llama4")
    config.architectures = ["Llama4ForConditionalGeneration"]
    assert model_class(config).__name__ == "Llama4ForCausalLM"
