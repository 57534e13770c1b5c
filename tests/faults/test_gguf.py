"""Every GGUF header that cannot be trusted is refused in one line that says why."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.gguf_files import SHARED, field, header, tensor, text, write_model, write_tensors
from lamina import AutoModel
from lamina.checkpoint.gguf import open_gguf
from lamina.errors import (
    CheckpointError,
    HeaderError,
    LaminaError,
    MissingShardError,
    MissingTensorError,
    TruncatedError,
    UnsupportedError,
)

HUGE = 2**62
ONE = [tensor("a", [8], 0, 0)]
DATA = bytes(32)
NESTED = text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) + bytes(12)
DAMAGED: dict[str, tuple[bytes, type[LaminaError], str]] = {
    "empty": (b"", TruncatedError, "is empty"),
    "short": (b"GGUF\x03\0\0\0", TruncatedError, "has 8 bytes, fewer than any GGUF file"),
    "other": (b"ABCD" + bytes(60), HeaderError, "does not begin like a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", CheckpointError, "Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html><body>", CheckpointError, "is a web page"),
    "version one": (header(version=1), UnsupportedError, "version 1, versions 2 and 3 can be read: convert it again"),
    "version four": (header(version=4), UnsupportedError, "version 4, versions 2 and 3 can be read: upgrade lamina"),
    "big-endian": (header(version=3 << 24), UnsupportedError, "big-endian"),
    "no tensors": (header(), CheckpointError, "holds no tensors"),
    "too many fields": (header(counts=(0, 9)) + DATA, HeaderError, "has the key '' twice"),
    "endless fields": (header([field("k", 1)], counts=(0, 2**63)), LaminaError, "continues to byte|twice|unknown"),
    "endless tensors": (header(counts=(2**63, 0)), TruncatedError, "continues to byte"),
    "endless key": (header([struct.pack("<Q", HUGE)]), HeaderError, f"a key of {HUGE} bytes, at most 65535"),
    "endless text": (
        header([text("k") + struct.pack("<IQ", 8, HUGE)]), TruncatedError, "the download is incomplete, fetch it again"
    ),
    "endless array": (
        header([text("k") + struct.pack("<IIQ", 9, 4, 2**64 - 1)]), TruncatedError, "continues to byte 73786976"
    ),
    "endless words": (
        header([text("k") + struct.pack("<IIQ", 9, 8, HUGE)]) + bytes(256), TruncatedError, "continues to byte"
    ),
    "nested array": (header([NESTED]), HeaderError, "an array of the unknown type 9 under 'k'"),
    "unknown value": (header([text("k") + struct.pack("<II", 13, 0)]), HeaderError, "unknown type 13 under 'k'"),
    "half a truth": (header([text("k") + struct.pack("<IB", 7, 2)]), HeaderError, "2 as the truth value of 'k'"),
    "key twice": (header([field("k", 1)] * 2), HeaderError, "has the key 'k' twice"),
    "not UTF-8": (header([struct.pack("<Q", 1) + b"\xff" + bytes(8)]), HeaderError, "a key that is not UTF-8"),
    "alignment zero": (header([field("general.alignment", 0)]), HeaderError, "the alignment 0, which is no power of"),
    "alignment odd": (header([field("general.alignment", 48)]), HeaderError, "the alignment 48"),
    "alignment text": (header([field("general.alignment", "x")]), HeaderError, "the alignment x"),
    "tensor twice": (header((), ONE * 2) + DATA, HeaderError, "has the tensor 'a' twice"),
    "dimensions": (header((), [tensor("a", [1] * 5, 0, 0)]), HeaderError, "5 dimensions for tensor 'a', at most 4"),
    "huge size": (header((), [tensor("a", [2**63], 0, 0)]), HeaderError, r"a size or offset beyond 2\^63"),
    "huge product": (header((), [tensor("a", [HUGE, 8], 0, 0)]), HeaderError, r"more than 2\^60 elements"),
    "huge offset": (header((), [tensor("a", [8], 0, 2**63)]), HeaderError, r"a size or offset beyond 2\^63"),
    "half a block": (header((), [tensor("a", [48], 8, 0)]) + DATA, HeaderError, "rows of 48 elements, Q8_0 has blocks"),
    "unknown type": (header((), [tensor("a", [8], 99, 0)]) + DATA, UnsupportedError, "is of GGUF type 99"),
    "type of old": (header((), [tensor("a", [8], 4, 0)]) + DATA, UnsupportedError, "another quantisation, such as"),
    "overlap": (
        header((), [*ONE, tensor("b", [8], 0, 16)]) + DATA * 2, HeaderError, "'b' in .* inside tensor 'a'"
    ),
    "same place": (header((), [*ONE, tensor("b", [8], 0, 0)]) + DATA, HeaderError, "inside tensor 'a'"),
    "hole": (header((), [*ONE, tensor("b", [8], 0, 64)]) + DATA * 3, HeaderError, "where .* was expected"),
    "not at the start": (header((), [tensor("a", [8], 0, 32)]) + DATA * 2, HeaderError, "where .* was expected"),
    "cut off": (header((), ONE) + DATA[:-1], TruncatedError, "tensor 'a' in .* ends at byte .* the file at"),
    "no data": (header((), ONE), TruncatedError, "the download is incomplete, fetch it again"),
    "one of two": (header([field("split.count", 2)], ONE) + DATA, MissingShardError, "says that it is one of 2 files"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_header_is_refused(fault: str, tmp_path: Path) -> None:
    raw, error, message = DAMAGED[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_a_file_cut_anywhere_in_its_header_is_incomplete(tmp_path: Path) -> None:
    whole = header([field("general.architecture", "llama"), field("n", 7)], ONE)
    path = tmp_path / "model.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TruncatedError):
            open_gguf(path)


def test_no_single_byte_makes_anything_but_an_error_or_a_header(tmp_path: Path) -> None:
    whole = header([field("general.architecture", "llama"), field("n", 7)], ONE)
    path = tmp_path / "model.gguf"
    refused = 0
    for at in range(len(whole)):
        for value in (0, 1, 127, 255):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :] + DATA)
            try:
                open_gguf(path)
            except LaminaError:
                refused += 1
    assert refused > len(whole)


def test_the_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.checkpoint.gguf.MAX_HEADER_BYTES", 100)
    path = tmp_path / "model.gguf"
    path.write_bytes(header([field("k", "x" * 90)], ONE) + DATA)
    with pytest.raises(HeaderError, match="more than 100 bytes"):
        open_gguf(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [(Path.mkdir, "is a folder where a GGUF file was expected"), (pipe, "no regular file"),
     (lambda path: path.symlink_to("gone"), "is a broken link to gone"), (lambda path: None, "there is no file")],
)  # fmt: skip
def test_what_is_no_file_is_named(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "model.gguf")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(header([field("split.count", 3)], ONE) + DATA)
    with pytest.raises(MissingShardError, match=r"needs m-00002-of-00003\.gguf \(and 1 more of 3\): there is no file"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_parts_that_hold_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(header([field("split.count", 2)], ONE) + DATA)
    with pytest.raises(CheckpointError, match=r"tensor 'a' is both in m-00001-of-00002\.gguf and in m-00002"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_an_architecture_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header([field("general.architecture", "rwkv9")], ONE) + DATA)
    with pytest.raises(UnsupportedError, match="does not know GGUF files of the architecture 'rwkv9'"):
        AutoModel.from_pretrained(str(path))
    path.write_bytes(header([field("general.architecture", "clip"), field("general.type", "mmproj")], ONE) + DATA)
    with pytest.raises(UnsupportedError, match=r"model\.gguf is the projector of a multimodal model .*: give the GGUF"):
        AutoModel.from_pretrained(str(path))
    for architecture in ("gpt-oss", "deci", "t5"):
        write_tensors(path, architecture, SHARED, {"a": np.zeros((96, 256), np.float32)})
        with pytest.raises(UnsupportedError):
            AutoModel.from_pretrained(str(path))
    path.write_bytes(header([field("k", 1)], ONE) + DATA)
    with pytest.raises(CheckpointError, match="does not say which architecture it has"):
        AutoModel.from_pretrained(str(path))


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        AutoModel.from_pretrained(str(path))


def test_half_of_the_experts_is_not_enough(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3moe")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xx_exps.weight"))
    with pytest.raises(
        MissingTensorError, match=r"experts\.gate_up_proj', of which the file has only 'blk\.1\.ffn_gate"
    ):
        AutoModel.from_pretrained(str(path))


def test_a_file_that_changes_while_it_streams_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama")
    file = open_gguf(path)
    with path.open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(CheckpointError, match="load the model again"):
        file.checkpoint.verify_unchanged()
