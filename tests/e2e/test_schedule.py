"""From a built model and its trace to weights as bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.families import write_tiny
from helpers.judge import plain_model
from lamina.checkpoint import Checkpoint, open_checkpoint
from lamina.hf.building.build import Request, build
from lamina.hf.trace import trace
from lamina.plan.schedule import Convert, Cut, Weight
from lamina.weights import addresses
from lamina.weights.describe import Weights, describe


def _described(folder: Path, **options: object) -> Weights:
    checkpoint = open_checkpoint(str(folder))
    model = build(Request(str(folder), options), checkpoint)
    return describe(model, checkpoint, trace(model))


def _value(weight: Weight, weights: Weights) -> torch.Tensor:
    """The weight, from the bytes that its pieces name."""
    stored = bytearray(weight.stored_nbytes)
    for piece in weight.pieces:
        with open(piece.extent.file, "rb") as file:
            file.seek(piece.extent.offset)
            stored[piece.at : piece.at + piece.extent.length] = file.read(piece.extent.length)
    raw = torch.frombuffer(stored, dtype=torch.uint8)
    dtype = getattr(torch, weight.dtype)
    if weight.convert is Convert.REPLAY:
        return weights.replays[weight.name](raw)
    if weight.convert is Convert.CAST:
        return raw.view(weights.stored_dtypes[weight.name]).to(dtype).view(weight.shape)
    return raw.view(dtype).view(weight.shape)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize(
    "family", "llama gpt2 mixtral gpt_oss dbrx phimoe qwen3_next bloom jamba longcat_flash".split()
)
def test_the_bytes_of_every_weight_are_its_values(family: str, options: dict[str, torch.dtype], tmp_path: Path) -> None:
    write_tiny(family, tmp_path, max_shard_size="100KB")
    weights = _described(tmp_path, **options)
    wanted = plain_model(tmp_path, family, **options).state_dict()
    for name, weight in weights.schedule.weights.items():
        assert torch.equal(_value(weight, weights), wanted[name]), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_merged_experts_are_addresses_not_copies(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    weights = _described(tmp_path).schedule.weights
    experts = [weight for name, weight in weights.items() if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert experts
    assert all(weight.convert is Convert.NONE and len(weight.pieces) > 1 for weight in experts)
    assert {weight.cut for weight in experts} == {Cut.EXPERTS}


def test_what_may_be_cut_and_what_is_looked_up(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    weights = _described(tmp_path).schedule.weights
    assert weights["model.embed_tokens.weight"].gathered
    assert weights["lm_head.weight"].cut is Cut.ROWS
    assert weights["model.layers.0.mlp.up_proj.weight"].cut is Cut.ROWS
    assert all(weight.always for weight in weights.values() if len(weight.shape) < 2)
    assert not any(weight.always for weight in weights.values() if len(weight.shape) == 2)


@pytest.mark.parametrize("family", ["llama", "camembert", "gemma4"])
def test_a_tied_table_is_multiplied_whole_and_looked_up_by_row(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, tie=True)
    schedule = _described(tmp_path).schedule
    (tied,) = (weight for weight in schedule.weights.values() if weight.shape[:1] == (256,) and len(weight.shape) == 2
               and "per_layer" not in weight.name)  # fmt: skip
    assert not tied.gathered
    assert [call.module for call in schedule.root.walk() if tied.name in call.touches] == [
        "lm_head.decoder" if family == "camembert" else "lm_head"
    ]


def _rows(checkpoint: Checkpoint, weight: Weight, first: int, count: int) -> bytes:
    out = bytearray(weight.stored_nbytes // weight.rows * count)
    for piece in weight.pieces_of_rows(first, count):
        with open(piece.extent.file, "rb") as file:
            file.seek(piece.extent.offset)
            out[piece.at : piece.at + piece.extent.length] = file.read(piece.extent.length)
    return bytes(out)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (3, 1), (0, 4)])
def test_rows_of_a_merged_weight(first: int, count: int, tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path)
    weights = _described(tmp_path)
    weight = weights.schedule.weights["model.layers.2.mlp.experts.gate_up_proj"]
    wanted = _value(weight, weights)[first : first + count]
    assert _rows(open_checkpoint(str(tmp_path)), weight, first, count) == wanted.numpy().tobytes()


@pytest.mark.parametrize(
    "change",
    [lambda patch: patch.setattr(addresses, "SHORTEST_RUN", 1 << 30),
     lambda patch: patch.setattr(addresses, "MOST_RUNS", 1)],
)  # fmt: skip
def test_a_weight_in_too_many_pieces_is_replayed(
    change: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny("mixtral", tmp_path)
    change(monkeypatch)
    weights = _described(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert weights.schedule.weights[name].convert is Convert.REPLAY
    stored = load_file(tmp_path / "model.safetensors")
    experts = [f"model.layers.0.block_sparse_moe.experts.{i}" for i in range(4)]
    wanted = torch.stack([torch.cat([stored[f"{e}.w1.weight"], stored[f"{e}.w3.weight"]]) for e in experts])
    assert torch.equal(_value(weights.schedule.weights[name], weights), wanted)
