"""A config without a dtype: the files are judged as plain transformers judges them, however they are laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from helpers import quantize
from helpers.families import write_tiny
from lamina.checkpoint import open_checkpoint
from lamina.hf.building.build import Request, build
from lamina.store import split
from lamina.tensors.torch_pickle import read_pickled

Tensors = dict[str, torch.Tensor]
OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"  # what old checkpoints hold in float32, and nobody needs
FIRST = "a.inv_freq"  # the same, first by its name


def _single(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def _sharded(folder: Path, tensors: Tensors, stated: str | None = None) -> None:
    names = sorted(tensors, reverse=True)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    metadata = {"total_size": 1, **({"dtype": stated} if stated else {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def _stated(folder: Path, tensors: Tensors) -> None:
    _sharded(folder, tensors, "float16")


def _pickled(folder: Path, tensors: Tensors) -> None:
    torch.save({name: tensors[name] for name in sorted(tensors, reverse=True)}, folder / "pytorch_model.bin")


def _pickled_first(folder: Path, tensors: Tensors) -> None:
    odd = next(name for name in (OLD, FIRST) if name in tensors)
    torch.save({odd: tensors[odd], **tensors}, folder / "pytorch_model.bin")


def _folder(root: Path, write: Callable[[Path, Tensors], None], dtype: torch.dtype, odd: str) -> Path:
    write_tiny("llama", root, dtype=dtype)
    tensors = load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    write(root, {**tensors, odd: torch.rand(8)})
    _without_dtype(root)
    return root


def _without_dtype(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    config.pop("dtype")
    (root / "config.json").write_text(json.dumps(config))


def _dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def _streamed(root: Path, **options: object) -> dict[str, torch.dtype]:
    return _dtypes(build(Request(str(root), options), open_checkpoint(root, read_pickled=read_pickled)))


@pytest.mark.parametrize("odd", [OLD, FIRST])
@pytest.mark.parametrize("write", [_single, _sharded, _stated, _pickled, _pickled_first])
def test_it_is_the_dtype_that_transformers_takes(
    write: Callable[[Path, Tensors], None], odd: str, tmp_path: Path
) -> None:
    root = _folder(tmp_path, write, torch.bfloat16, odd)
    wanted = _dtypes(AutoModelForCausalLM.from_pretrained(root))
    assert _streamed(root) == _streamed(root, dtype="auto") == wanted


@pytest.mark.parametrize("odd", [OLD, FIRST])
@pytest.mark.parametrize("compression", [None, "8bit"])
def test_a_store_keeps_what_the_checkpoint_was_judged_by(compression: str | None, odd: str, tmp_path: Path) -> None:
    root = _folder(tmp_path / "model", _single, torch.float16, odd)
    wanted = _dtypes(AutoModelForCausalLM.from_pretrained(root))
    store = Path(split(str(root), to=tmp_path / "store", compression=compression).folder)
    assert _streamed(store) == wanted
    if compression is None:  # any program reads it, and transformers the same as before
        assert _dtypes(AutoModelForCausalLM.from_pretrained(store)) == wanted


def test_quantised_weights_are_unpacked_to_it(tmp_path: Path) -> None:
    plain = _folder(tmp_path / "plain", _single, torch.bfloat16, OLD)
    quantize.write_quantized(
        plain, tmp_path / "fp8", quantize.fp8((32, 32)), {"quant_method": "fp8", "weight_block_size": [32, 32]}
    )
    says = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    wanted = _dtypes(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=says))
    assert _streamed(tmp_path / "fp8") == wanted == dict.fromkeys(wanted, torch.bfloat16)
