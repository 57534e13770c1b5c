"""The tiny checkpoints are what they are said to be: original layout, lively, and the same after a reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES, MOE, MORE_FAMILIES, input_ids, tiny_config, tiny_model, write_tiny


def test_no_family_is_listed_twice() -> None:
    assert len(set(FAMILIES + MORE_FAMILIES)) == len(FAMILIES) + len(MORE_FAMILIES)
    assert set(FAMILIES + MORE_FAMILIES) >= MOE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_checkpoint_gives_the_logits_of_the_model_it_was_written_from(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    write_tiny(family, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = input_ids(model.config)
    with torch.no_grad():
        wanted, got = model(ids).logits, reloaded(ids).logits
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    tokens = reloaded.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert len(tokens) == 5


def test_a_checkpoint_has_the_published_names(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in index["weight_map"]
    assert len(set(index["weight_map"].values())) > 1


def test_hybrids_have_every_kind_of_layer() -> None:
    for family in ("qwen3_next", "jamba", "bamba", "lfm2", "gemma3_text", "llama4_text", "minimax"):
        assert len(set(tiny_config(family).layer_types)) == 2, family


def test_tie_is_the_callers_choice(tmp_path: Path) -> None:
    assert tiny_config("llama").tie_word_embeddings is False
    write_tiny("llama", tmp_path, tie=True, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
