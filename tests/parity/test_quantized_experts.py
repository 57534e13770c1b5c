"""Experts of a quantised checkpoint are read one by one, packed, as those of an ordinary one are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import quantize
from helpers.families import write_tiny
from helpers.judge import answers, judge, minimum_of, steady, streamed_model
from lamina.plan.schedule import Convert

BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
METHODS = {
    "fp8": (quantize.fp8((32, 32)), BLOCK_FP8),
    "awq": (quantize.awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "hqq": (quantize.hqq(4, 32), {"quant_method": "hqq"}),
    "torchao": (quantize.torchao_int4(32), {"quant_method": "torchao"}),
    "mxfp4": (quantize.mxfp4_experts, {"quant_method": "mxfp4"}, r".*experts\.(gate_up|down)_proj"),
}


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("deepseek_v3", "fp8"),
        ("qwen3_moe", "fp8"),
        ("mixtral", "awq"),
        ("gpt_oss", "mxfp4"),
        ("qwen3_moe", "hqq"),
        ("qwen3_moe", "torchao"),
    ],
)
def test_experts_are_on_demand(family: str, method: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path / "plain")
    unpacked = quantize.write_quantized(tmp_path / "plain", tmp_path / "quantized", *METHODS[method])
    said = judge(unpacked, family)
    said = replace(said, folder=tmp_path / "quantized", minimum=minimum_of(tmp_path / "quantized"))
    model = streamed_model(said.folder, said.minimum)
    with model.lamina:
        logits, tokens = answers(model, said.ids)
        plan, stats = model.lamina.plan, model.lamina.stats
    assert (logits == said.logits).all() and (tokens == said.tokens).all()
    weights = [weight for module in plan.experts for weight in module.weights if len(weight.shape) == 3]
    assert weights and all(weight.convert is Convert.UNPACK for weight in weights)
    assert stats.expert_misses and stats.expert_bytes_read < stats.expert_misses * plan.expert_slot_bytes
    assert plan.expert_slot_bytes < 0.8 * max(
        sum(weight.unpacked_nbytes // weight.experts for weight in module.weights) + 8192 * len(module.weights)
        for module in plan.experts
    )
