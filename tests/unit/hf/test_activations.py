"""What a traced pass says of activations at lengths that were not traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.families import tiny_model
from lamina.hf.trace import WORKSPACE, trace


def test_scores_of_attention_count_however_small_they_are_where_it_was_traced() -> None:
    """bloom multiplies queries with keys itself: scores in 16 bits, in fp32, their softmax in fp32."""
    model = tiny_model("bloom", dtype=torch.bfloat16)
    tokens, heads = 4096, model.config.n_head
    scores = heads * tokens**2
    assert trace(model).activations(tokens) / WORKSPACE >= scores * (2 + 4 + 4)


def test_attention_that_is_one_kernel_keeps_no_scores() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    traced = trace(model)
    assert traced.activations(8192) <= 2.1 * traced.activations(4096)


class _Views(nn.Module):
    """A result whose tensor is gone while a view of it lives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [(x + each)[:1] for each in range(8)]
        return torch.cat(kept)


def test_a_view_keeps_all_of_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = trace(model).activations(64) / WORKSPACE
    layer = model.model.layers[0]
    forward, views = layer.forward, _Views()

    def larger(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        views(x)
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", larger)
    wide = 64 * model.config.hidden_size * 4
    assert trace(model).activations(64) / WORKSPACE >= max(before, 8 * wide)
