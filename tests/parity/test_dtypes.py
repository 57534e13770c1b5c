"""However a checkpoint is stored (dtypes, names, shards, alignment), the answers are plain transformers' own."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import tiny_model, write_tiny
from helpers.judge import BUDGETS, assert_equal, judge, plain_model, steady, streamed_model
from helpers.tiny import write_llama
from lamina.plan import layout, planner
from lamina.plan.schedule import Convert

SMALL_AND_LARGE = ("minimum", "resident")


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _parity(folder: Path, family: str, budgets: tuple[str, ...] = BUDGETS, **options: object) -> None:
    said = judge(folder, family, **options)
    for budget in budgets:
        assert_equal(said, said.budget(budget), **options)


# -- dtypes


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_than_stored(stored: torch.dtype, wanted: torch.dtype, family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=stored)
    _parity(tmp_path, family, SMALL_AND_LARGE, dtype=wanted)


@pytest.mark.parametrize("name", ["bfloat16", "auto"])
def test_a_dtype_by_name(name: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    _parity(tmp_path, "llama", SMALL_AND_LARGE, dtype=name)


def test_the_dtype_of_a_text_model_inside_a_multimodal_one(tmp_path: Path) -> None:
    write_tiny("qwen3_5", tmp_path)
    _parity(tmp_path, "qwen3_5", SMALL_AND_LARGE, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_what_must_stay_float32_does(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    _parity(tmp_path, family, SMALL_AND_LARGE, dtype=torch.bfloat16)
    plain = plain_model(tmp_path, family, dtype=torch.bfloat16)
    streamed = streamed_model(tmp_path, 2_000_000_000, dtype=torch.bfloat16)
    with streamed.lamina:
        wanted = {name: tensor.dtype for name, tensor in plain.state_dict().items()}
        assert {name: tensor.dtype for name, tensor in streamed.state_dict().items()} == wanted
    assert set(wanted.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}], ids=str)
def test_a_checkpoint_of_mixed_dtypes(options: dict[str, torch.dtype], tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    _rewrite(tmp_path, lambda tensors: {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(tensors.items())})
    _parity(tmp_path, "llama", **options)


# -- tied weights and buffers


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "camembert"])
def test_a_tied_head(family: str, budget: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, tie=True)
    said = judge(tmp_path, family)
    model = assert_equal(said, said.budget(budget))
    tied = model.get_output_embeddings().weight
    assert tied is model.get_input_embeddings().weight or not model.lamina.plan.resident.issuperset({"lm_head.weight"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", "llama gemma3_text bloom mpt gpt2 codegen falcon llama4_text phi3 minimax".split())
def test_buffers_that_no_checkpoint_holds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    plain = dict(plain_model(tmp_path, family, dtype=dtype).named_buffers())
    streamed = streamed_model(tmp_path, 2_000_000_000, dtype=dtype)
    with streamed.lamina:
        got = dict(streamed.named_buffers())
        assert got.keys() == plain.keys()
        for name, buffer in plain.items():
            assert got[name].dtype == buffer.dtype, name
            assert torch.equal(got[name], buffer), name


# -- names and files


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "dbrx", "phimoe"])
def test_many_small_shards(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, max_shard_size="40KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 4
    _parity(tmp_path, family)


def test_experts_of_one_layer_lie_in_several_shards(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path, max_shard_size="40KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_layer = {file for name, file in files.items() if name.startswith("model.layers.1.") and "experts" in name}
    assert len(of_layer) > 1
    _parity(tmp_path, "mixtral", ("minimum",))


def test_a_checkpoint_of_the_base_model_alone(tmp_path: Path) -> None:
    tiny_model("llama", tie=True).model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]  # which is what then loads: tests/parity/test_multimodal.py
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    _parity(tmp_path, "llama")


def test_a_prefix_that_the_model_does_not_have(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    _rewrite(tmp_path, lambda tensors: {f"wrapped.{name}": tensor for name, tensor in tensors.items()})
    _parity(tmp_path, "llama", key_mapping={r"^wrapped\.": ""})


def test_tensors_that_the_model_does_not_want(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    _rewrite(tmp_path, lambda tensors: {**tensors, "of_another_head.weight": torch.ones(3)})
    _parity(tmp_path, "llama", ("minimum",))


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 12, 20, 32, 60])
def test_data_that_begins_at_an_odd_address(shift: int, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    _shift(tmp_path / "model.safetensors", shift)
    _parity(tmp_path, "llama")


def _shift(file: Path, shift: int) -> None:
    """Pad a file's header so that its data begins `shift` bytes behind a multiple of 64."""
    whole = file.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header, data = whole[8 : 8 + length], whole[8 + length :]
    header += b" " * ((shift - 8 - length) % 64)
    assert (8 + len(header)) % 64 == shift
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


# -- weights that never exist as a whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [8192, 10_007])
@pytest.mark.parametrize("tie", [False, True])
def test_a_head_in_blocks_of_rows(tie: bool, vocabulary: int, dtype: torch.dtype, tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=dtype, vocab_size=vocabulary, tie_word_embeddings=tie)
    said = judge(tmp_path)
    plan = assert_equal(said, said.minimum).lamina.plan
    head = [item for item in plan.items if item.module == "lm_head"]
    assert len(head) > 2
    assert sum(item.parts[0].count for item in head) == vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "starcoder2", "opt"])
def test_linears_of_layers_in_blocks_of_rows(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "UNIT_SIZES", (0,))
    monkeypatch.setattr(layout, "ROW_MULTIPLE", 32)
    write_tiny(family, tmp_path, dtype=dtype)
    said = judge(tmp_path)
    plan = assert_equal(said, said.minimum).lamina.plan
    assert {item.module.split(".")[1] for item in plan.items if item.block and "." in item.module}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_experts_one_at_a_time(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=dtype)
    said = judge(tmp_path, family)
    plan = assert_equal(said, said.minimum).lamina.plan
    assert plan.experts and plan.expert_slots == 1
    assert not any(item.module.endswith("experts") for item in plan.items)


def test_a_cast_is_a_cast_in_the_plan(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    model = streamed_model(tmp_path, 2_000_000_000, dtype=torch.bfloat16)
    with model.lamina:
        weights = model.lamina._engine.schedule.values()
        assert {weight.convert for weight in weights} == {Convert.CAST}
        assert all(weight.stored_itemsize == 4 and weight.itemsize == 2 for weight in weights)
