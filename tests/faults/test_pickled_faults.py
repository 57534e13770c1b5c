"""Pickles that are damaged, hostile, or hold something else: one line each, and no code of theirs runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.families import write_tiny
from lamina import AutoModel
from lamina.errors import (
    ChangedError,
    CheckpointError,
    HeaderError,
    LaminaError,
    MissingShardError,
    TruncatedError,
    UnsupportedError,
)
from lamina.tensors.torch_pickle import read_pickled

TENSORS = {"a": torch.arange(24.0).view(4, 6), "b": torch.ones(3, dtype=torch.int64)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refusal(path: Path, error: type[LaminaError]) -> str:
    with pytest.raises(error) as caught:
        read_pickled(path)
    line = str(caught.value)
    assert "\n" not in line and path.name in line and len(line) < 500
    return line


@pytest.mark.parametrize("archive", [True, False])
def test_what_is_written_is_found(path: Path, archive: bool) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=archive)
    entries, fingerprint = read_pickled(path)
    whole = path.read_bytes()
    assert fingerprint.size == len(whole)
    for name, tensor in TENSORS.items():
        extent = entries[name].extent
        stored = whole[extent.offset : extent.offset + extent.length]
        assert torch.equal(torch.frombuffer(bytearray(stored), dtype=tensor.dtype).view(tensor.shape), tensor)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_hostile_pickle_runs_nothing(path: Path, tmp_path: Path, archive: bool) -> None:
    content = {**TENSORS, "x": Hostile(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    assert "mkdir" in refusal(path, HeaderError)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_runs_nothing(path: Path, tmp_path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    assert "nothing that torch.save writes" in refusal(path, HeaderError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 20, 100, 300, 0.5, 0.9, -1])
def test_a_file_that_ends_early(path: Path, archive: bool, cut: float) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=archive)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if 0 < cut < 1 else int(cut)])
    refusal(path, CheckpointError)


def test_a_download_that_stopped_says_so(path: Path) -> None:
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "the download is incomplete" in refusal(path, TruncatedError)


@pytest.mark.parametrize("archive", [True, False])
def test_damage_anywhere_is_a_line_or_other_numbers(path: Path, archive: bool) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=archive)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            entries, _ = read_pickled(path)
        except LaminaError as error:
            assert "\n" not in str(error)
        else:
            assert all(
                e.extent.offset >= 0 and e.extent.offset + e.extent.length <= len(whole) for e in entries.values()
            )


def test_a_compressed_archive(path: Path) -> None:
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as stored:
        members = {member: stored.read(member) for member in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    refusal(path, CheckpointError if not path.exists() else LaminaError)


@pytest.mark.parametrize(("said", "fits"), [(24, True), (48, False), (96, False)])
def test_a_storage_that_is_said_to_be_of_another_size(path: Path, said: int, fits: bool) -> None:
    torch.save({"a": torch.arange(24.0)}, path)
    with zipfile.ZipFile(path) as stored:
        members = {member: stored.read(member) for member in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            if "/." not in member:  # by these torch would compute where storages are, and not look
                archive.writestr(member, content.replace(b"cpuq\x06K\x18t", b"cpuq\x06K" + bytes([said]) + b"t"))
    if fits:
        assert read_pickled(path)[0]["a"].extent.length == 96
    else:
        refusal(path, HeaderError)


def test_the_other_order_of_bytes(path: Path) -> None:
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as stored:
        member = next(name for name in stored.namelist() if name.endswith("byteorder"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr(member, b"big")
    assert path.read_bytes() != whole
    refusal(path, LaminaError)


@pytest.mark.parametrize(
    ("content", "error", "line"),
    [
        ({"a": torch.ones(4, 6).t()}, UnsupportedError, "elements do not follow one another"),
        ({"a": torch.ones(1).expand(5)}, UnsupportedError, "elements do not follow one another"),
        ({"a": torch.ones(4, 6).to_sparse()}, UnsupportedError, "no plain tensor"),
        ({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, LaminaError, ""),
        ([torch.ones(3)], HeaderError, "holds a list without tensors by name"),
        ({"epoch": 3}, HeaderError, "without tensors by name"),
    ],
)
def test_what_is_no_plain_state_dict(path: Path, content: object, error: type[LaminaError], line: str) -> None:
    torch.save(content, path)
    assert line in refusal(path, error)


def test_a_row_of_one_column_is_contiguous_however_its_strides_are(path: Path) -> None:
    torch.save({"a": torch.arange(6.0).view(6, 1).t()}, path)
    assert read_pickled(path)[0]["a"].shape == (1, 6)


def test_empty_and_scalar_tensors(path: Path) -> None:
    torch.save({"none": torch.empty(0, 3), "one": torch.tensor(4.0)}, path)
    entries, _ = read_pickled(path)
    assert (entries["none"].shape, entries["none"].extent.length) == ((0, 3), 0)
    assert (entries["one"].shape, entries["one"].extent.length) == ((), 4)


@pytest.mark.parametrize("start", [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html></html>"])
def test_something_else_under_the_name(path: Path, start: bytes) -> None:
    path.write_bytes(start)
    refusal(path, CheckpointError)


def test_no_file_and_a_folder(path: Path) -> None:
    refusal(path, MissingShardError)
    path.mkdir()
    refusal(path, CheckpointError)


def test_a_file_that_changes_while_it_streams(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model = AutoModel.from_pretrained(str(tmp_path), device="cpu", memory="2GB")
    with model.lamina:
        os.utime(tmp_path / "pytorch_model.bin", ns=(1, 1))
        with pytest.raises(ChangedError, match=r"pytorch_model\.bin was written to"):
            model.lamina._engine.readers.verify()
