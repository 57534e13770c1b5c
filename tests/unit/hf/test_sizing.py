"""What a pass with an image or a sound takes, counted without weights, against what a real one has alive."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from helpers.multimodal import CASES, class_of, config_of, whole_of
from lamina.hf.recorder import Memory
from lamina.hf.sizing import Sizing, has_media

WITH_MEDIA = [name for name in CASES if has_media(whole_of(name))]
LLAVA = "LlavaForConditionalGeneration"


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return class_of(name)(config_of(name)).eval()


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_what_is_counted_is_what_is_alive(name: str) -> None:
    model, inputs = _model(name), whole_of(name)
    memory = Memory([*model.parameters(), *model.buffers()])
    with torch.no_grad(), memory:
        model(**inputs)
    assert Sizing(model).activations(inputs) >= memory.peak


def test_a_pass_over_text_counts_nothing() -> None:
    assert Sizing(_model(LLAVA)).activations({"input_ids": torch.tensor([[1, 2]])}) == 0


def test_a_cache_is_left_as_it_is() -> None:
    cache = DynamicCache()
    Sizing(_model(LLAVA)).activations({**whole_of(LLAVA), "past_key_values": cache, "use_cache": True})
    assert cache.get_seq_length() == 0
    assert all(getattr(layer, "keys", None) is None for layer in cache.layers)


def test_what_cannot_be_counted_to_the_end_is_said() -> None:
    sizing = Sizing(_model(LLAVA))
    shape = {"pixel_values": torch.zeros(1, 7, 8, 8)}  # channels that the tower has no weights for
    sizing.activations({**whole_of(LLAVA), **shape})
    assert sizing.fallback is not None and "images and sound are counted up to where" in sizing.fallback
