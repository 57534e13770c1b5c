"""transformers' own pipelines with a model of Lamina: what they give with one of plain transformers, to the last bit.

The models are at the smallest budget, so that all of them stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, pipeline

from e2e.test_attachments import TEMPLATE, write_llava, write_whisper
from helpers.families import tiny_config
from helpers.judge import minimum_of, streamed_model
from helpers.tiny import words

pytestmark = pytest.mark.usefixtures("steadily")

SPECIAL = "<pad> <s> </s> <unk> [MASK] user assistant :".split()
WORDS = [*SPECIAL, *(f"w{index}" for index in range(256 - len(SPECIAL)))]
TEXT = "w7 w3 w200 w9 w31 w3"
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@dataclass(frozen=True)
class Case:
    """A task with the class of a model for it, and a call of its pipeline.

    Attributes:
        kind: name of the class in transformers.
        asked: what is given to the pipeline.
        options: of the call.
        fields: of the config.
        family: whose tiny config the class has; None where `write` makes the folder.
        processed: the pipeline takes a processor, not a tokenizer.
    """

    kind: str
    asked: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    write: Callable[[Path], Path] | None = None
    processed: bool = False


def picture() -> Any:
    image = pytest.importorskip("PIL.Image")
    return image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def sound() -> Any:
    return np.random.default_rng(0).normal(size=16_000).astype("float32")


def shown() -> Any:
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is this"}]
    return [{"role": "user", "content": parts}]


ENCODER = {"is_decoder": False}
CASES: dict[str, Case] = {
    "text-generation": Case("LlamaForCausalLM", lambda: TEXT, GREEDY, family="llama"),
    "text-generation, a chat": Case(
        "LlamaForCausalLM", lambda: [{"role": "user", "content": TEXT}], GREEDY, family="llama"
    ),
    "text-generation, several": Case(
        "LlamaForCausalLM", lambda: [TEXT, "w5 w6"], {**GREEDY, "batch_size": 2}, family="llama"
    ),
    "feature-extraction": Case("BertModel", lambda: TEXT, fields=ENCODER, family="bert"),
    "text-classification": Case(
        "BertForSequenceClassification", lambda: [TEXT, "w5"], {"top_k": None},
        {**ENCODER, "num_labels": 3}, "bert",
    ),
    "text-classification, a decoder": Case(
        "LlamaForSequenceClassification", lambda: [TEXT, "w5"], {"top_k": None}, {"num_labels": 3}, "llama"
    ),
    "token-classification": Case(
        "BertForTokenClassification", lambda: TEXT, {"aggregation_strategy": "simple"},
        {**ENCODER, "num_labels": 4}, "bert",
    ),
    "zero-shot-classification": Case(
        "BertForSequenceClassification", lambda: TEXT,
        {"candidate_labels": ["w8", "w20"], "hypothesis_template": "w1 {}"},
        {**ENCODER, "id2label": LABELS, "label2id": {label: id for id, label in LABELS.items()}}, "bert",
    ),
    "fill-mask": Case("BertForMaskedLM", lambda: "w7 [MASK] w200", fields=ENCODER, family="bert"),
    "image-text-to-text": Case(
        "LlavaForConditionalGeneration", shown, {"generate_kwargs": GREEDY},
        write=lambda folder: write_llava(folder, TEMPLATE), processed=True,
    ),
    "any-to-any": Case(
        "LlavaForConditionalGeneration", shown, {"generate_kwargs": GREEDY},
        write=lambda folder: write_llava(folder, TEMPLATE), processed=True,
    ),
    "automatic-speech-recognition": Case(
        "WhisperForConditionalGeneration", sound, {"generate_kwargs": GREEDY},
        write=lambda folder: write_whisper(folder, width=64), processed=True,
    ),
}  # fmt: skip


def written(case: Case, folder: Path) -> Path:
    """A checkpoint of the case, with what makes its inputs."""
    if case.write is not None:
        return case.write(folder)
    assert case.family is not None
    config = tiny_config(case.family)
    for name, value in case.fields.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, case.kind)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    if model.can_generate():
        model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model.save_pretrained(folder)
    special = {"pad_token": "<pad>", "mask_token": "[MASK]", "sep_token": "</s>"}
    words(WORDS, "<unk>", padding_side="left", chat_template=CHAT, **special).save_pretrained(folder)
    return folder


def piped(task: str, model: PreTrainedModel, with_what: Any, case: Case) -> Any:
    """What a pipeline gives."""
    inputs: dict[str, Any] = {"tokenizer": with_what}
    if case.processed:
        inputs = {"processor": with_what}
        if "speech" in task:
            inputs = {"tokenizer": with_what.tokenizer, "feature_extractor": with_what.feature_extractor}
    return pipeline(task, model=model, **inputs)(case.asked(), **case.options)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_gives_what_it_gives_with_plain_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, task = CASES[name], name.partition(",")[0]
    if task == "any-to-any":  # it asks for torchvision, of which a processor that works with Pillow takes nothing
        monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    folder = written(case, tmp_path)
    kind = getattr(transformers, case.kind)
    plain = kind.from_pretrained(folder).eval()
    processed = (AutoProcessor if case.processed else AutoTokenizer).from_pretrained(folder)
    wanted = piped(task, plain, processed, case)
    with streamed_model(folder, minimum_of(folder)) as model:
        assert isinstance(model, kind) and model.lamina.plan.streams
        found = piped(task, model, model.processor if case.processed else model.tokenizer, case)
        assert model.lamina.stats.passes > 0
    assert comparable(found) == comparable(wanted)
    assert comparable(wanted), "something comes out"


def comparable(value: Any) -> Any:
    """The same without what compares by identity: pictures within a chat."""
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items() if key not in ("image", "input_text")}
    return [comparable(each) for each in value] if isinstance(value, list) else value
