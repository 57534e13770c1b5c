"""Every layout in which people have a checkpoint opens, and leads to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.make_safetensors import vector, write, write_sharded
from lamina.checkpoint import Checkpoint, Fingerprint, open_checkpoint
from lamina.checkpoint.choose import choose_weights, small_files

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": vector(1, 2), "b": vector(3)},
    "model-00002-of-00002.safetensors": {"c": vector(4, 5, 6)},
}


def contents(checkpoint: Checkpoint) -> dict[str, list[int]]:
    found = {}
    for name, entry in checkpoint.tensors.items():
        raw = Path(entry.extent.file).read_bytes()
        found[name] = list(raw[entry.extent.offset : entry.extent.offset + entry.extent.length])
    return found


def test_single_file(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"a": vector(1, 2), "b": vector(3)})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.root == str(tmp_path)
    assert checkpoint.files == (str(file),)
    assert contents(checkpoint) == {"a": [1, 2], "b": [3]}
    assert checkpoint.nbytes == 3


def test_shards_with_an_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_sharded(tmp_path, SHARDS)))
    assert checkpoint.files == tuple(str(tmp_path / name) for name in SHARDS)
    assert contents(checkpoint) == {"a": [1, 2], "b": [3], "c": [4, 5, 6]}
    assert checkpoint.nbytes == 6


def test_total_size_of_the_index_is_only_informative(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    assert open_checkpoint(str(tmp_path)).nbytes == 6


def test_tensors_that_the_index_leaves_out_are_there_as_in_transformers(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    write(tmp_path / "model-00002-of-00002.safetensors", {"c": vector(4, 5, 6), "extra": vector(7)})
    assert contents(open_checkpoint(str(tmp_path)))["extra"] == [7]


def test_files_that_the_index_leaves_out_are_not_opened(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert len(open_checkpoint(str(tmp_path)).files) == 2


def test_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    write(tmp_path / "model.safetensors", {"a": vector(9)})
    assert contents(open_checkpoint(str(tmp_path))) == {"a": [9]}


def test_shards_as_links_into_a_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    write_sharded(snapshot, SHARDS)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(str(snapshot))
    assert contents(checkpoint)["c"] == [4, 5, 6]
    assert checkpoint.files[0] == str(snapshot / "model-00001-of-00002.safetensors")
    checkpoint.verify_unchanged()


def test_one_loose_file_of_any_name(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", {"a": vector(1)})
    assert contents(open_checkpoint(str(tmp_path))) == {"a": [1]}


def test_loose_files_without_an_index(tmp_path: Path) -> None:
    for name, tensors in SHARDS.items():
        write(tmp_path / name, tensors)
    assert contents(open_checkpoint(str(tmp_path))) == {"a": [1, 2], "b": [3], "c": [4, 5, 6]}


def test_a_file_itself(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    checkpoint = open_checkpoint(tmp_path / "model-00002-of-00002.safetensors")
    assert checkpoint.root == str(tmp_path)
    assert contents(checkpoint) == {"c": [4, 5, 6]}


def test_an_index_itself(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS, name="other.safetensors.index.json")
    assert len(open_checkpoint(tmp_path / "other.safetensors.index.json").tensors) == 3


def test_paths_may_be_relative_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m" / "model.safetensors", {"a": vector(1)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("m").files == open_checkpoint("~/m").files == (str(tmp_path / "m" / "model.safetensors"),)


def test_variant_single_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": vector(1)})
    write(tmp_path / "model.fp16.safetensors", {"a": vector(2)})
    assert contents(open_checkpoint(str(tmp_path), variant="fp16")) == {"a": [2]}
    assert contents(open_checkpoint(str(tmp_path))) == {"a": [1]}


def test_variant_with_an_index(tmp_path: Path) -> None:
    shards = {name.replace(".", ".fp16.", 1): tensors for name, tensors in SHARDS.items()}
    write_sharded(tmp_path, shards, name="model.safetensors.index.fp16.json")
    assert len(open_checkpoint(str(tmp_path), variant="fp16").tensors) == 3


def test_subfolder(tmp_path: Path) -> None:
    write(tmp_path / "text" / "model.safetensors", {"a": vector(1)})
    checkpoint = open_checkpoint(str(tmp_path), subfolder="text/")
    assert checkpoint.root == str(tmp_path / "text")


def test_unchanged_files_pass(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_sharded(tmp_path, SHARDS)))
    checkpoint.verify_unchanged()
    status = os.stat(checkpoint.files[0])
    assert checkpoint.fingerprints[checkpoint.files[0]] == Fingerprint.of(status)


def test_only_numbered_shards_of_the_right_layout_are_chosen() -> None:
    names = ["model-00001-of-00001.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
    assert choose_weights(names, None, "m") == ["model-00001-of-00001.safetensors"]
    assert choose_weights(names, "fp16", "m") == ["model.fp16.safetensors"]


def test_the_only_variant_needs_no_name() -> None:
    assert choose_weights(["model.fp16.safetensors"], None, "m") == ["model.fp16.safetensors"]


REPOSITORY = [
    ".gitattributes",
    "README.md",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_new.py",
    "onnx/config.json",
    "original/params.json",
    "original/model.py",
    "text/config.json",
    "text/additional_chat_templates/rag.jinja",
    "text/weights.bin",
    "tokenizer.json",
    "tokenizer.model",
]


def test_small_files_are_those_of_the_model() -> None:
    assert small_files(REPOSITORY, "", trust_remote_code=False) == [
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_code_is_taken_only_where_it_is_trusted() -> None:
    plain = small_files(REPOSITORY, "", trust_remote_code=False)
    assert set(small_files(REPOSITORY, "", trust_remote_code=True)) - set(plain) == {"modeling_new.py"}


def test_small_files_of_a_subfolder_come_with_those_beside_it() -> None:
    plain = small_files(REPOSITORY, "", trust_remote_code=False)
    more = {"text/config.json", "text/additional_chat_templates/rag.jinja"}
    assert set(small_files(REPOSITORY, "text", trust_remote_code=False)) - set(plain) == more


def test_importing_is_light() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "numpy")
    code = f"import sys, lamina.checkpoint; print([name for name in {heavy} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
