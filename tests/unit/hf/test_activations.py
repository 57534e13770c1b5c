"""What a traced pass says of activations at lengths that were not traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.families import tiny_model
from lamina.hf.recorder import attention_fuses
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


@pytest.mark.parametrize(
    ("heads", "values", "enable_gqa"),
    [(8, 32, False), (8, 32, True), (1, 32, False), (1, 32, True), (2, 32, True), (8, 16, False), (2, 16, True)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_which_attention_keeps_scores_is_what_torch_does(
    heads: int, values: int, enable_gqa: bool, masked: bool
) -> None:
    query, key, value = torch.randn(1, 8, 64, 32), torch.randn(1, heads, 64, 32), torch.randn(1, heads, 64, values)
    mask = torch.zeros(1, 1, 64, 64) if masked else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)
    ran = {event.key for event in profiled.key_averages()}
    fused = not any("softmax" in name or "_attention_math" in name for name in ran)
    meta = [tensor.to("meta") for tensor in (query, key, value)]
    answer = attention_fuses(*meta, attn_mask=None if mask is None else mask.to("meta"), enable_gqa=enable_gqa)
    assert answer == fused


def test_one_head_of_keys_for_many_of_queries_keeps_scores() -> None:
    """falcon's: the processor has no kernel for it."""
    model = tiny_model("falcon", dtype=torch.bfloat16)
    assert model.config.multi_query
    tokens, heads = 4096, model.config.num_attention_heads
    assert trace(model).activations(tokens) / WORKSPACE >= heads * tokens**2 * 4


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
