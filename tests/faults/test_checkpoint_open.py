"""One named test for each way in which a folder can fail to be a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.make_safetensors import to_bytes, vector, write, write_sharded
from lamina.checkpoint import open_checkpoint
from lamina.errors import (
    ChangedError,
    CheckpointError,
    HeaderError,
    LaminaError,
    MissingShardError,
    ModelNotFoundError,
    RequestError,
    TruncatedError,
    UnsupportedError,
)

INDEX = "model.safetensors.index.json"
SHARDS = {
    "model-00001-of-00003.safetensors": {"a": vector(1)},
    "model-00002-of-00003.safetensors": {"b": vector(2)},
    "model-00003-of-00003.safetensors": {"c": vector(3)},
}


def refusal(path: Path | str, error: type[LaminaError], **options: str) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(path, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def index_refusal(root: Path, text: str | bytes | object, error: type[LaminaError] = CheckpointError) -> str:
    write(root / "a.safetensors", {"a": vector(1)})
    raw = text if isinstance(text, bytes) else text.encode() if isinstance(text, str) else json.dumps(text).encode()
    (root / INDEX).write_bytes(raw)
    line = refusal(root, error)
    assert INDEX in line
    return line


def test_no_such_path(tmp_path: Path) -> None:
    assert "there is no model at" in refusal(tmp_path / "gone", ModelNotFoundError)


def test_path_below_a_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": vector(1)})
    refusal(tmp_path / "model.safetensors" / "x", ModelNotFoundError)


def test_path_with_a_nul_byte() -> None:
    refusal("mo\0del", ModelNotFoundError)


def test_path_too_long_for_the_system() -> None:
    refusal("m" * 5000, ModelNotFoundError)


def test_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to("gone")
    assert "broken link to gone" in refusal(tmp_path / "m", CheckpointError)


def test_empty_folder(tmp_path: Path) -> None:
    assert "there are no weights in" in refusal(tmp_path, CheckpointError)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "it needs model.safetensors" in refusal(tmp_path, CheckpointError)


FORMS = {
    "model.ckpt": "a PyTorch pickle under another ending: give it the ending .bin",
    "tf_model.h5": r"TensorFlow weights: transformers 4 reads it",
    "flax_model.msgpack": "Flax weights: transformers 4 reads it",
    "model.onnx": "an ONNX graph: take the safetensors or GGUF",
}


@pytest.mark.parametrize("name", FORMS)
def test_folder_of_another_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert f"holds no weights but {name}, which is {FORMS[name]}" in refusal(tmp_path, UnsupportedError)
    assert f"{name} is {FORMS[name]}" in refusal(tmp_path / name, UnsupportedError)


def test_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"")
    assert f"as in '{tmp_path}:m.Q4_K_M.gguf'" in refusal(tmp_path, UnsupportedError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "last.pth", "last.pt"])
def test_a_pickle_where_nobody_reads_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / name):
        assert f"{name} is a PyTorch pickle, which cannot be read here" in refusal(path, UnsupportedError)


def test_a_pickled_shard_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert "lacks pytorch_model-00002-of-00002.bin" in refusal(tmp_path, MissingShardError)


def test_several_pickles_and_nothing_says_which(tmp_path: Path) -> None:
    for name in ("epoch1.pt", "epoch2.pt"):
        (tmp_path / name).write_bytes(b"")
    assert "epoch1.pt, epoch2.pt, and nothing says which" in refusal(tmp_path, RequestError)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"])
def test_what_a_trainer_leaves_is_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "there are no weights in" in refusal(tmp_path, CheckpointError)


def test_an_adapter_in_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "an adapter" in refusal(tmp_path, UnsupportedError)


@pytest.mark.parametrize("file", ["model.safetensors", "../pytorch_model.bin", "pytorch_model.pkl"])
def test_an_index_of_pickles_that_names_something_else(tmp_path: Path, file: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refusal(tmp_path, CheckpointError)


def test_file_that_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "is no weights file" in refusal(tmp_path / "config.json", UnsupportedError)


def test_folder_of_an_adapter(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {"a": vector(1)})
    assert "holds an adapter" in refusal(tmp_path, UnsupportedError)


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert "may not be read by this user" in refusal(tmp_path, CheckpointError)


def test_path_that_may_not_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("lamina.checkpoint.checkpoint.os.stat", refuse)
        with pytest.raises(CheckpointError, match="change its permissions"):
            open_checkpoint("/models/m")


def test_weights_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "is a folder where a weights file was expected" in refusal(tmp_path, CheckpointError)


def test_weights_file_that_is_empty(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty" in refusal(tmp_path, TruncatedError)


def test_weights_file_that_is_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    assert "broken link to ../../blobs/0123" in refusal(tmp_path, MissingShardError)


def test_weights_file_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path, CheckpointError)


def test_shard_missing(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    line = refusal(tmp_path, MissingShardError)
    assert INDEX in line and "model-00002-of-00003.safetensors" in line and "fetch the model again" in line


def test_several_shards_missing_are_counted(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "(and 1 more of 3)" in refusal(tmp_path, MissingShardError)


def test_shard_that_is_a_broken_link(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to("../blobs/gone")
    assert "broken link to ../blobs/gone" in refusal(tmp_path, MissingShardError)


def test_shard_truncated(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model-00003-of-00003.safetensors" in refusal(tmp_path, TruncatedError)


def test_shard_damaged(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    assert "model-00003-of-00003.safetensors" in refusal(tmp_path, HeaderError)


def test_shard_missing_without_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in refusal(tmp_path, MissingShardError)


def test_shards_of_an_absurd_number(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-999999.safetensors", {"a": vector(1)})
    assert "lacks model-00002-of-999999.safetensors" in refusal(tmp_path, MissingShardError)


def test_tensor_that_no_shard_holds_is_none_of_the_checkpoint(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    write(tmp_path / "model-00002-of-00003.safetensors", {"other": vector(2)})
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "other", "c"}


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    weight_map = {"a": "model-00002-of-00003.safetensors", "b": "model-00001-of-00003.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: Path(e.extent.file).name for name, e in open_checkpoint(tmp_path).tensors.items()} == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00002-of-00003.safetensors",
    }


@pytest.mark.parametrize("chosen", [1, 2, None])
def test_tensor_in_two_shards_is_the_one_of_the_index_else_the_last(tmp_path: Path, chosen: int | None) -> None:
    write_sharded(tmp_path, SHARDS)
    write(tmp_path / "model-00001-of-00003.safetensors", {"a": vector(1), "d": vector(1)})
    write(tmp_path / "model-00002-of-00003.safetensors", {"b": vector(2), "a": vector(1)})
    weight_map = {name: file for file, own in SHARDS.items() for name in own}
    weight_map["d"] = "model-00001-of-00003.safetensors"
    weight_map["a"] = f"model-0000{chosen}-of-00003.safetensors"
    if chosen is None:
        del weight_map["a"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    opened = open_checkpoint(tmp_path)
    used = f"model-0000{chosen or 2}-of-00003.safetensors"
    assert Path(opened.tensors["a"].extent.file).name == used
    (said,) = opened.fallbacks
    both = "model-00001-of-00003.safetensors and model-00002-of-00003.safetensors"
    why = "the last, for" if chosen is None else "as"
    assert said.startswith(f"tensor 'a' is in two files ({both}): {used} is used, {why} {INDEX}")


def test_tensor_in_two_loose_files(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"": vector(1)})
    write(tmp_path / "two.safetensors", {"": vector(1)})
    assert "tensor '' is both in one.safetensors and in two.safetensors" in refusal(tmp_path, CheckpointError)


def test_index_not_json(tmp_path: Path) -> None:
    assert "is not JSON" in index_refusal(tmp_path, "{")


def test_index_not_utf8(tmp_path: Path) -> None:
    assert "is not UTF-8" in index_refusal(tmp_path, b"\xff\xfe")


def test_index_not_an_object(tmp_path: Path) -> None:
    assert "is a JSON list" in index_refusal(tmp_path, [])


def test_index_empty(tmp_path: Path) -> None:
    assert "is not JSON" in index_refusal(tmp_path, "")


def test_index_a_git_lfs_pointer(tmp_path: Path) -> None:
    assert "git lfs pull" in index_refusal(tmp_path, "version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("weight_map", [None, [], {}, "a.safetensors"])
def test_index_without_a_weight_map(tmp_path: Path, weight_map: object) -> None:
    assert "has no weight_map" in index_refusal(tmp_path, {"weight_map": weight_map})


@pytest.mark.parametrize("file", [None, 1, ["a.safetensors"], {"a": 1}])
def test_index_with_a_file_that_is_not_text(tmp_path: Path, file: object) -> None:
    assert "a file that is not text" in index_refusal(tmp_path, {"weight_map": {"a": file}})


def test_index_with_a_name_twice(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'
    assert "names 'a' twice" in index_refusal(tmp_path, text)


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..",
        ".",
        "",
        "c:\\a.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
    ],
)
def test_index_with_a_hostile_file_name(tmp_path: Path, file: str) -> None:
    assert "not a plain name" in index_refusal(tmp_path, {"weight_map": {"a": file}})


def test_index_with_a_pickle(tmp_path: Path) -> None:
    assert "no safetensors file" in index_refusal(tmp_path, {"weight_map": {"a": "pytorch_model.bin"}})


def test_index_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    assert "is not a file" in refusal(tmp_path, CheckpointError)


def test_index_that_is_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / INDEX).symlink_to("gone")
    assert "broken link to gone" in refusal(tmp_path, CheckpointError)


def test_index_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as handle:
        handle.truncate(100_000_001)
    assert "too many for an index" in refusal(tmp_path, CheckpointError)


def test_unknown_variant(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": vector(1)})
    line = refusal(tmp_path, RequestError, variant="fp16")
    assert "no variant 'fp16', only model.safetensors" in line


def test_several_variants_and_none_chosen(tmp_path: Path) -> None:
    write(tmp_path / "model.fp16.safetensors", {"a": vector(1)})
    write(tmp_path / "model.bf16.safetensors", {"a": vector(1)})
    assert "only the variants bf16, fp16: choose one" in refusal(tmp_path, RequestError)


def test_unknown_subfolder(tmp_path: Path) -> None:
    assert "leave subfolder out" in refusal(tmp_path, RequestError, subfolder="gone")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\0b"])
def test_subfolder_that_leads_out(tmp_path: Path, subfolder: str) -> None:
    assert "inside the model's own" in refusal(tmp_path, RequestError, subfolder=subfolder)


def test_file_that_became_longer(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"a": vector(1)})
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ChangedError, match=r"model\.safetensors had \d+ bytes when it was opened and has \d+ now"):
        checkpoint.verify_unchanged()


def test_file_that_was_written_to(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"a": vector(1)})
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(to_bytes({"a": vector(2)}))
    os.utime(file, ns=(0, 0))
    with pytest.raises(ChangedError, match=r"model\.safetensors was written to"):
        checkpoint.verify_unchanged()


def test_file_that_went_away(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"a": vector(1)})
    checkpoint = open_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(ChangedError, match=r"model\.safetensors is gone"):
        checkpoint.verify_unchanged()
