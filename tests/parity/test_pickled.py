"""Weights in torch's pickles are streamed where they are, and give plain transformers' logits and tokens."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.families import write_tiny
from helpers.judge import Judge, assert_equal, judge, minimum_of, steady
from lamina.tensors.torch_pickle import read_pickled

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def _judged(tmp_path: Path, write: Callable[[Path, Tensors], object], family: str, **options: object) -> Judge:
    """Plain transformers' word on a safetensors checkpoint, and the folder where the same weights are pickled."""
    write_tiny(family, tmp_path / "plain", **options)  # type: ignore[arg-type]
    said = judge(tmp_path / "plain", family)
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in (tmp_path / "plain").glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    write(folder, OrderedDict(load_file(tmp_path / "plain" / "model.safetensors")))
    assert not list(folder.glob("*.safetensors"))
    return Judge(folder, said.ids, said.logits, said.tokens, said.nbytes, minimum_of(folder))


def _single(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _legacy(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _sharded(folder: Path, tensors: Tensors, index: bool = True) -> None:
    names = list(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for file, own in shards.items():
        torch.save({name: tensors[name] for name in own}, folder / file)
    if index:
        weight_map = {name: file for file, own in shards.items() for name in own}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _shards_alone(folder: Path, tensors: Tensors) -> None:
    _sharded(folder, tensors, index=False)


def _one_storage(folder: Path, tensors: Tensors) -> None:
    """Every tensor a view into one storage, as some trainers flatten them."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    views = {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
    torch.save(views, folder / "pytorch_model.bin")


def _of_a_trainer(folder: Path, tensors: Tensors) -> None:
    torch.save({"epoch": 3, "state_dict": {k: torch.nn.Parameter(v) for k, v in tensors.items()}}, folder / "last.pt")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save([], folder / "training_args.bin")


WAYS = {
    "single": _single,
    "sharded": _sharded,
    "shards without an index": _shards_alone,
    "before 1.6": _legacy,
    "one storage": _one_storage,
    "of a trainer": _of_a_trainer,
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_save(way: str, tmp_path: Path) -> None:
    said = _judged(tmp_path, WAYS[way], "llama", dtype=torch.bfloat16)
    _minimum(said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen3", "falcon"])
def test_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    said = _judged(tmp_path, _sharded, family, dtype=dtype)
    for budget in ("minimum", "half"):
        assert_equal(said, said.budget(budget))


def _minimum(said: Judge) -> PreTrainedModel:
    model = assert_equal(said, said.minimum)
    assert model.lamina.plan.streams
    return model


def test_tied_weights_are_stored_once_and_read_once(tmp_path: Path) -> None:
    def tied(folder: Path, tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        _single(folder, tensors)

    model = _minimum(_judged(tmp_path, tied, "llama", tie=True))
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight or not model.lamina.plan.resident.issuperset({"lm_head.weight"})
    entries, _ = read_pickled(tmp_path / "pickled" / "pytorch_model.bin")
    assert entries["lm_head.weight"].extent == entries["model.embed_tokens.weight"].extent


def test_safetensors_come_first(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nobody reads this")
    assert_equal(said := judge(tmp_path), said.minimum)


@pytest.mark.parametrize("same", [True, False])
def test_both_names_of_a_tied_weight_in_safetensors(same: bool, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, tie=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    said = judge(tmp_path)
    model = assert_equal(said, said.budget("resident"))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is same
