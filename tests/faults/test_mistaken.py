"""What people have in a folder in place of a checkpoint: one line says what it is and what to do."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.families import write_tiny
from lamina import AutoModel, FallbackWarning, plan_model
from lamina.checkpoint import open_checkpoint
from lamina.checkpoint.choose import choose_weights
from lamina.errors import (
    CheckpointError,
    LaminaError,
    MissingShardError,
    MissingTensorError,
    RequestError,
    UnsupportedError,
)
from lamina.hf import config
from lamina.hf.building.build import Request, build
from lamina.hf.tokenizer import load_tokenizer
from lamina.store import split

IDS = torch.arange(3, 12)[None]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def refusal(path: Path, error: type[LaminaError]) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "error", "line"),
    [
        (["consolidated.safetensors", "params.json", "config.json"], UnsupportedError, "Mistral's own layout alone"),
        (["consolidated-00001-of-00002.safetensors", "params.json"], UnsupportedError, "Mistral's own layout alone"),
        (["consolidated.00.pth", "params.json", "tokenizer.model"], UnsupportedError, "convert_llama_weights_to_hf.py"),
        (
            ["model.safetensors.part1", "model.safetensors.part10", "model.safetensors.part2"],
            UnsupportedError,
            "in order, `cat model.safetensors.part1 model.safetensors.part2 model.safetensors.part10 > model.safet",
        ),
        (["m.gguf.part1of2", "m.gguf.part2of2"], UnsupportedError, "`cat m.gguf.part1of2 m.gguf.part2of2 > m.gguf`"),
        (["m.gguf.part1of3", "m.gguf.part3of3"], MissingShardError, "m.gguf in 3 parts, of which part 2 is missing"),
        (["m.gguf-split-a", "m.gguf-split-b"], UnsupportedError, "`cat m.gguf-split-a m.gguf-split-b > m.gguf`"),
        (["pytorch_model.bin.00", "pytorch_model.bin.01"], UnsupportedError, "> pytorch_model.bin`"),
        (["xaa", "xab", "config.json"], UnsupportedError, "`cat xaa xab > model.safetensors`"),
        (["model.safetensors.incomplete"], CheckpointError, "a download that has not ended"),
        (["model-00001-of-00002.safetensors.aria2"], CheckpointError, "a download that has not ended"),
        (["model.zip", "README.md"], UnsupportedError, "holds model.zip alone: unpack it"),
        (["model.safetensors.gz"], UnsupportedError, "holds model.safetensors.gz alone: unpack it"),
        (["m.gguf.aa"], MissingShardError, "holds m.gguf.aa, one part of m.gguf: fetch the others"),
        (["model.tar.gz"], UnsupportedError, "holds model.tar.gz alone: unpack it"),
        (["adapter_model.safetensors"], UnsupportedError, "holds an adapter, not a model: give the model that it bel"),
        (["adapter_model.bin", "training_args.bin"], UnsupportedError, "holds an adapter, not a model"),
    ],
)
def test_a_folder_of_something_else(names: list[str], error: type[LaminaError], line: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert line in refusal(tmp_path, error)


@pytest.mark.parametrize("name", ["model.zip", "model.tar", "model.tgz"])
def test_an_archive(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert f"{name} is an archive: unpack it" in refusal(tmp_path / name, UnsupportedError)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m.gguf.part{number}of2").write_bytes(b"GGUF")
    assert "join them in order, `cat m.gguf.part1of2 m.gg" in refusal(tmp_path / "m.gguf.part1of2", UnsupportedError)


def test_gguf_parts_without_the_first(tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingShardError, match=r"needs m-00001-of-00003\.gguf \(and 1 more of 3\)"):
        plan_model(str(tmp_path))


def test_a_folder_that_holds_the_folder_of_the_model(tmp_path: Path) -> None:
    inside = tmp_path / "models--org--m" / "snapshots" / "0123"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    assert f"the model is in a folder of it, give {inside}" in refusal(tmp_path / "models--org--m", CheckpointError)
    other = tmp_path / "models--org--m" / "snapshots" / "4567"
    other.mkdir()
    (other / "model.safetensors").touch()
    assert f"in folders of it, give one, such as {inside}" in refusal(tmp_path / "models--org--m", CheckpointError)


def test_an_adapter_alone_names_the_model_that_it_belongs_to(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    line = refusal(tmp_path, UnsupportedError)
    assert "an adapter for org/base, not a model: give the model that it belongs to" in line
    assert line.endswith(f"AutoModel.from_pretrained('org/base'), then model.load_adapter('{tmp_path}')")


def test_an_adapter_beside_its_model_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    folder, apart = tmp_path / "model", tmp_path / "adapter"
    write_tiny("llama", folder)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(folder)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits  # transformers applies it
    line = r"holds an adapter beside the model \(adapter_config\.json\).* model\.load_adapter\(that folder\) applies it"
    for call in (plan_model, AutoModel.from_pretrained, split):
        with pytest.raises(UnsupportedError, match=line):
            call(str(folder))
    with monkeypatch.context() as patch:  # transformers goes on without
        patch.setattr(config, "is_peft_available", lambda: False)
        with pytest.warns(FallbackWarning, match="is not applied"):
            AutoModel.from_pretrained(str(folder), memory="3GB", device="cpu").lamina.close()
        assert not list(Path(split(str(folder), to=tmp_path / "store").folder).glob("adapter*"))
    apart.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(apart / name)
    model = AutoModel.from_pretrained(str(folder), memory="3GB", device="cpu")
    with model.lamina, torch.no_grad():
        model.load_adapter(str(apart))
        assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("family", "prefix", "who"),
    [
        ("llama", "module.", "torch's DataParallel"),
        ("llama", "_orig_mod.", "torch.compile"),
        ("llama", "base_model.model.", "PEFT"),
        ("llama", "model.net.", None),
        ("gpt2", "module.", "torch's DataParallel"),  # whose head is tied
        ("mixtral", "module.", "torch's DataParallel"),  # whose experts are merged
    ],
)
def test_names_that_all_begin_with_something_more(family: str, prefix: str, who: str | None, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensorError) as caught:
        build(Request(str(tmp_path), {}), open_checkpoint(tmp_path))
    line, adds = str(caught.value), f", which {who} adds" if who else ""
    mapping = {f"^{re.escape(prefix)}": ""}
    assert f"all names there begin with {prefix!r}{adds}: from_pretrained(..., key_mapping={mapping!r})" in line
    build(Request(str(tmp_path), {"key_mapping": mapping}), open_checkpoint(tmp_path))


def test_names_that_lack_a_beginning(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    tensors = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name != "lm_head.weight"}
    other = {name.removeprefix("model.layers."): tensor for name, tensor in tensors.items()}
    save_file({"lm_head.weight": torch.rand(256, 64), **other}, tmp_path / "model.safetensors")
    with pytest.raises(
        MissingTensorError, match=r"the names there lack the beginning 'model\.layers\.': from_pretrained"
    ):
        build(Request(str(tmp_path), {}), open_checkpoint(tmp_path))


BAD = {
    "a byte order mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark, which JSON does not allow: save it as"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 but UTF-16"),
    "a pointer": (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "a web page": (b"<!doctype html>", "is a web page"),
    "cut": (b'{"model_type": "lla', "is not JSON ("),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_small_file_that_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, max_shard_size="200KB")
    content, line = BAD[what]
    index, config = tmp_path / "model.safetensors.index.json", tmp_path / "config.json"
    right = index.read_bytes(), config.read_bytes()
    index.write_bytes(content)
    assert f"{index.name} {line}" in refusal(tmp_path, CheckpointError) or not content
    index.write_bytes(right[0])
    config.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        build(Request(str(tmp_path), {}), open_checkpoint(tmp_path))
    assert str(caught.value).startswith(f"{config} {line}")
    config.write_bytes(right[1])
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(RequestError) as refused:
        load_tokenizer(str(tmp_path), False)
    assert f"{tmp_path / 'tokenizer_config.json'} {line}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_vocabulary_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(RequestError, match=r"tokenizer\.model is a Git LFS pointer"):
        load_tokenizer(str(tmp_path), False)


PIECES = [
    *(
        "model",
        "pytorch_model",
        "consolidated",
        "adapter_model",
        "x",
        "aa",
        "-00001-of-00002",
        "-00002-of-00003",
        ".00",
    ),
    *(".safetensors", ".bin", ".pth", ".gguf", ".part", "1of2", "1", ".index.json", ".zip", ".fp16", ".", "-", ".tmp"),
]


def test_any_names_in_a_folder_are_a_choice_or_one_line() -> None:
    chance, lines = random.Random(5), set()
    for _ in range(4000):
        names = ["".join(chance.choices(PIECES, k=chance.randrange(1, 5))) for _ in range(chance.randrange(4))]
        names += chance.sample(["config.json", "params.json", "adapter_config.json"], chance.randrange(3))
        try:
            chosen = choose_weights(names, chance.choice([None, None, "fp16"]), "m")
            assert chosen and set(chosen) <= set(names)
        except LaminaError as error:
            assert "\n" not in str(error)
            lines.add(type(error))
    assert lines == {UnsupportedError, CheckpointError, MissingShardError, RequestError}
