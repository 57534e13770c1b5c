"""Logits of `generate` for several rows at once: bit for bit those of plain transformers in fp32.

With `logits_to_keep=1` the input of the head is a slice of a larger tensor for each row, which torch multiplies in
another way than a contiguous tensor: whatever lies between must not make one of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.families import input_ids, write_tiny
from helpers.judge import minimum_of, plain_model, streamed_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_batches_have_the_logits_of_plain_transformers(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=torch.float32)
    plain = plain_model(tmp_path, family)
    if "moe" in family:  # as Lamina chooses
        plain.set_experts_implementation("eager")
    with streamed_model(tmp_path, minimum_of(tmp_path, draft=None), draft=None) as model:
        for rows in (2, 3, 5, 8, 9):
            ids = input_ids(plain.config, length=13).repeat(rows, 1)
            ids[1:, :5] = ids[1:, 5:10]
            given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
            given |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
            expected, got = plain.generate(ids, **given), model.generate(ids, **given)
            assert torch.equal(got.sequences, expected.sequences)
            for one, other in zip(got.logits, expected.logits, strict=True):
                assert torch.equal(one, other)
