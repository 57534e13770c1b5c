"""Tiny random checkpoints of what takes more than text, or is no causal language model, and inputs for them.

A case is a transformers class with a tiny config and the inputs of one pass. Sizes come from `tiny_config`; what that
leaves too large, and the special tokens, are in `_CASES`. This module knows nothing of Lamina.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from helpers.families import BOS, EOS, PAD, input_ids, tiny_config

MARK = 5  # the token that stands for a part of an image or of a sound
TEXT = 9  # tokens of a text
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A class and how to call it.

    Attributes:
        family: of the config.
        changes: of the tiny config, by dotted name.
        more: makes what a pass takes beside tokens, from a generator.
        marks: tokens that stand for it.
        encodes: there is an encoder, which takes the tokens, or `more` instead where there are no marks.
        parts: names of modules that a pass over text does not go through.
        unordered: endings of names of weights of these parts that are used in another order than they are defined
            in, or by another module: they are not there in time.
    """

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[torch.Generator], Inputs] | None = None
    marks: int = 0
    encodes: bool = False
    parts: tuple[str, ...] = ()
    unordered: tuple[str, ...] = ()


def _image(*shape: int, **others: Any) -> Callable[[torch.Generator], Inputs]:
    """Pixels of this shape, and tensors of these values."""
    return lambda generator: {
        "pixel_values": torch.randn(shape, generator=generator),
        **{name: torch.tensor(value) for name, value in others.items()},
    }


def _sound(*shape: int, **others: Any) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: {
        "input_features": torch.randn(shape, generator=generator),
        **{name: torch.tensor(value) for name, value in others.items()},
    }


_OF_QWEN = {"image_token_id": MARK, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
_MARKED = [[0] * (TEXT - 4) + [1] * 4 + [0] * 2]
_KEYS_FIRST = ("k_proj.weight", "v_proj.weight")  # before those of queries, which are used first
_START = {"decoder_start_token_id": BOS, "forced_eos_token_id": None}

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "LlavaForConditionalGeneration": Case(
            "llava",
            {"image_token_index": MARK, "vision_config.patch_size": 16, "vision_feature_layer": -2},
            _image(1, 3, 32, 32), 4, parts=("model.vision_tower", "model.multi_modal_projector"),
        ),
        "Qwen2VLForConditionalGeneration": Case(
            "qwen2_vl",
            {
                **_OF_QWEN, "vision_config.embed_dim": 64, "vision_config.hidden_size": 64,
                "text_config.rope_parameters": {
                    "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]
                },
            },
            _image(16, 1176, image_grid_thw=[[1, 4, 4]], mm_token_type_ids=_MARKED), 4, parts=("model.visual",),
        ),
        "Qwen3_5ForConditionalGeneration": Case(
            "qwen3_5",
            _OF_QWEN,
            _image(16, 1536, image_grid_thw=[[1, 4, 4]], mm_token_type_ids=_MARKED), 4, parts=("model.visual",),
        ),
        "Gemma3ForConditionalGeneration": Case(
            "gemma3",
            {"image_token_index": MARK, "mm_tokens_per_image": 4, "vision_config.patch_size": 8},
            _image(1, 3, 32, 32, token_type_ids=_MARKED), 4,
            parts=("model.vision_tower", "model.multi_modal_projector"),
            unordered=(*_KEYS_FIRST, "head.attention.out_proj.weight"),
        ),
        "MllamaForConditionalGeneration": Case(
            "mllama",
            {
                "image_token_index": MARK, "vision_config.patch_size": 8, "vision_config.num_global_layers": 2,
                "vision_config.intermediate_layers_indices": [1], "vision_config.vision_output_dim": 128,
            },
            _image(
                1, 1, 4, 3, 32, 32, aspect_ratio_ids=[[1]], aspect_ratio_mask=[[[1, 0, 0, 0]]],
                cross_attention_mask=[[[[1, 0, 0, 0]]] * (TEXT + 2)],
            ), 4, parts=("model.vision_model", "model.multi_modal_projector", "model.language_model.layers.3"),
            unordered=("gated_positional_embedding.embedding",),
        ),
        "Idefics3ForConditionalGeneration": Case(
            "idefics3",
            {"image_token_id": MARK, "vision_config.patch_size": 8, "pad_token_id": PAD},
            _image(1, 1, 3, 32, 32), 4, parts=("model.vision_model", "model.connector"), unordered=_KEYS_FIRST,
        ),
        "Qwen2AudioForConditionalGeneration": Case(
            "qwen2_audio",
            {"audio_token_index": MARK, "audio_config.max_source_positions": 8},
            _sound(1, 128, 16, feature_attention_mask=[[1] * 16]), 4,
            parts=("model.audio_tower", "model.multi_modal_projector"),
            unordered=(*_KEYS_FIRST, "embed_positions.weight"),
        ),
        "WhisperForConditionalGeneration": Case(
            "whisper",
            {**_START, "max_source_positions": 16, "suppress_tokens": None, "begin_suppress_tokens": None},
            _sound(1, 80, 32), encodes=True, parts=("model.encoder",), unordered=_KEYS_FIRST,
        ),
        "T5ForConditionalGeneration": Case("t5", {**_START, "d_kv": 16, "d_ff": 96}, encodes=True, parts=("encoder",)),
        "BartForConditionalGeneration": Case(
            "bart", _START, encodes=True, parts=("model.encoder",), unordered=_KEYS_FIRST
        ),
        "MarianMTModel": Case(
            "marian", {**_START, "eos_token_id": EOS}, encodes=True, parts=("model.encoder",), unordered=_KEYS_FIRST
        ),
        "BertForSequenceClassification": Case("bert", {"num_labels": 3}),
        "BertForTokenClassification": Case("bert", {"num_labels": 5}),
        "BertForMaskedLM": Case("bert", {"is_decoder": False}),
        "BertModel": Case("bert", {"is_decoder": False}),
        "LlamaForSequenceClassification": Case("llama", {"num_labels": 1}),
        "LlamaModel": Case("llama"),
    }
)  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    """The tiny config of a case."""
    config = tiny_config(CASES[name].family)
    for dotted, value in CASES[name].changes.items():
        part, _, last = dotted.rpartition(".")
        setattr(getattr(config, part) if part else config, last, value)
    return config


def class_of(name: str) -> type[PreTrainedModel]:
    """The class of a case."""
    kind: type[PreTrainedModel] = getattr(transformers, name)
    return kind


@torch.no_grad()
def write_case(name: str, folder: str | Path, seed: int = 0) -> None:
    """Write a checkpoint of a case in float32: every number of it random, so that each one shows in the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = class_of(name)._from_config(config_of(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(model.named_parameters()):
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    if model.can_generate():
        model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)


def text_of(name: str) -> Inputs:
    """A pass over text alone; of a model with an encoder, over text for the decoder as well."""
    ids = input_ids(config_of(name), TEXT)
    ids[ids == MARK] = MARK + 4
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if CASES[name].encodes else {})}


def whole_of(name: str, seed: int = 0) -> Inputs:
    """A pass through every part of the model."""
    case, inputs = CASES[name], text_of(name)
    if case.marks:
        at = TEXT - 4
        marks = torch.full((1, case.marks), MARK)
        inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :at], marks, inputs["input_ids"][:, at:-2]], dim=1)
    if case.more is not None:
        inputs |= case.more(torch.Generator().manual_seed(seed))
        if case.encodes:
            del inputs["input_ids"]
    return inputs
