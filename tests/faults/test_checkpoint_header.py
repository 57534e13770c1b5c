"""One named test for each way in which a header can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.make_safetensors import to_bytes, vector, with_prefix
from lamina.checkpoint import parse_header, read_header
from lamina.errors import CheckpointError, HeaderError, MissingShardError, TruncatedError, UnsupportedError

RIGHT: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def refusal(header: bytes | object, size: int = 24, error: type[Exception] = HeaderError) -> str:
    """The one line with which a header is refused; `size` is the bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(error) as caught:
        parse_header(raw, 8 + len(raw) + size, "/models/m/model-00003.safetensors")
    assert type(caught.value) is error
    line = str(caught.value)
    assert "\n" not in line and "model-00003.safetensors" in line and len(line) < 400
    return line


def with_x(**changes: object) -> dict[str, object]:
    return {"x": {**RIGHT, **changes}}


def file_refusal(path: Path, raw: bytes, error: type[Exception]) -> str:
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_header(path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_right_header_passes() -> None:
    raw = json.dumps(with_x()).encode()
    assert parse_header(raw, 8 + len(raw) + 24, "f")["x"].shape == (2, 3)


def test_empty_file(path: Path) -> None:
    assert "is empty: the download is incomplete" in file_refusal(path, b"", TruncatedError)


def test_file_shorter_than_eight_bytes(path: Path) -> None:
    assert "has 7 bytes" in file_refusal(path, b"\1\0\0\0\0\0\0", TruncatedError)


def test_header_longer_than_the_file(path: Path) -> None:
    line = file_refusal(path, to_bytes({"x": vector(1)})[:20], TruncatedError)
    assert "ends at byte" in line and "the file at 20" in line


def test_header_longer_than_the_cap(path: Path) -> None:
    assert "100000001 bytes" in file_refusal(path, (100_000_001).to_bytes(8, "little") + b"{}", HeaderError)


def test_header_length_of_all_ones(path: Path) -> None:
    file_refusal(path, b"\xff" * 64, HeaderError)


def test_header_of_no_bytes(path: Path) -> None:
    assert "is not JSON" in file_refusal(path, bytes(8), HeaderError)


def test_not_utf8() -> None:
    assert "is not UTF-8 (byte 2)" in refusal(b'{"\xff": 1}')


def test_not_json() -> None:
    assert "is not JSON" in refusal(b'{"x": ')


def test_json_behind_json() -> None:
    assert "is not JSON" in refusal(b"{} {}")


def test_not_an_object() -> None:
    assert "is a JSON list" in refusal([])


def test_nested_too_deeply() -> None:
    assert "nested too deeply" in refusal(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def test_name_twice() -> None:
    assert "names 'x' twice" in refusal(b'{"x": {}, "y": {}, "x": {}}')


def test_key_twice_in_a_tensor() -> None:
    assert "names 'dtype' twice" in refusal(b'{"x": {"dtype": "F32", "dtype": "F16"}}')


def test_many_names_twice_are_found_quickly() -> None:
    pairs = [f'"n{i}": 0' for i in range(50_000)]
    assert "twice" in refusal(("{" + ",".join([*pairs, '"n49999": 0']) + "}").encode())


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_lacks(constant: str) -> None:
    assert f"holds {constant}" in refusal(b'{"x": %s}' % constant.encode())


def test_integer_of_ten_thousand_digits() -> None:
    assert "is not JSON" in refusal(b'{"x": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}' % (b"9" * 10_000))


@pytest.mark.parametrize("header", [b'"shape": [-0], "data_offsets": [0, 0]', b'"shape": [0], "data_offsets": [-0, 0]'])
def test_minus_zero_is_refused_as_safetensors_does(header: bytes) -> None:
    refusal(b'{"x": {"dtype": "U8", %s}}' % header, size=0)


def test_name_that_is_not_unicode() -> None:
    assert "not valid Unicode" in refusal(b'{"\\ud800": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}}')


def test_name_with_line_breaks_stays_on_one_line() -> None:
    assert r"'a\nb'" in refusal({"a\nb": 1})


def test_name_of_a_million_letters_is_cut() -> None:
    refusal({"n" * 1_000_000: 1})


def test_metadata_not_an_object() -> None:
    assert "__metadata__" in refusal({"__metadata__": [], **with_x()})


def test_metadata_not_text() -> None:
    assert "__metadata__" in refusal({"__metadata__": {"format": 1}, **with_x()})


@pytest.mark.parametrize("info", [None, 1, "F32", [1], True])
def test_tensor_that_is_not_an_object(info: object) -> None:
    assert "not an object" in refusal({"x": info})


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_key_missing(key: str) -> None:
    assert f"has no {key}" in refusal({"x": {name: value for name, value in RIGHT.items() if name != key}})


def test_unknown_dtype() -> None:
    assert "'F31'" in refusal(with_x(dtype="F31"))


@pytest.mark.parametrize("dtype", [None, 32, ["F32"], {"F32": 1}])
def test_dtype_that_is_not_text(dtype: object) -> None:
    assert "as dtype, not text" in refusal(with_x(dtype=dtype))


@pytest.mark.parametrize("size", [-1, True, 2.0, "2", None, [2], 2**63])
def test_shape_of_something_else_than_sizes(size: object) -> None:
    assert "has a shape that is not" in refusal(with_x(shape=[size, 3]))


@pytest.mark.parametrize("shape", [None, 6, "23", {"0": 2}])
def test_shape_that_is_not_a_list(shape: object) -> None:
    assert "has a shape that is not" in refusal(with_x(shape=shape))


def test_shape_whose_product_overflows() -> None:
    assert "more than 2^63 bytes" in refusal(with_x(shape=[2**32, 2**32]))


def test_shape_that_overflows_before_a_zero() -> None:
    assert "more than 2^63 bytes" in refusal(with_x(shape=[2**62, 2**62, 0]))


def test_shape_of_a_million_sizes() -> None:
    refusal(with_x(shape=[2**62] * 1_000_000))


@pytest.mark.parametrize("offset", [-1, False, 0.0, "0", None, 2**63])
def test_offset_that_is_not_a_whole_number(offset: object) -> None:
    assert "data_offsets that are not" in refusal(with_x(data_offsets=[offset, 24]))


@pytest.mark.parametrize("offsets", [None, 24, [], [0], [0, 24, 48], {"0": 24}])
def test_offsets_that_are_not_two(offsets: object) -> None:
    assert "data_offsets that are not" in refusal(with_x(data_offsets=offsets))


def test_begin_behind_end() -> None:
    assert "begins at 24, behind its end at 0" in refusal(with_x(data_offsets=[24, 0]))


def test_offsets_shorter_than_the_shape() -> None:
    assert "takes 24 bytes by dtype and shape, 20 by its offsets" in refusal(with_x(data_offsets=[0, 20]))


def test_offsets_longer_than_the_shape() -> None:
    assert "takes 24 bytes by dtype and shape, 28 by its offsets" in refusal(with_x(data_offsets=[0, 28]))


def test_packed_dtype_of_half_a_byte() -> None:
    assert "has 12 bits" in refusal(with_x(dtype="F4", shape=[3], data_offsets=[0, 2]))


def test_tensor_behind_the_end_of_the_file() -> None:
    raw = json.dumps(with_x()).encode()
    line = refusal(raw, size=20, error=TruncatedError)
    assert line == (
        f"tensor 'x' in model-00003.safetensors ends at byte {8 + len(raw) + 24}, the file at {8 + len(raw) + 20}: "
        "the download is incomplete, fetch it again"
    )


def test_overlap() -> None:
    line = refusal({"a": RIGHT, "b": {**RIGHT, "data_offsets": [20, 44]}}, size=44)
    assert "'b'" in line and "inside tensor 'a'" in line


def test_same_bytes_twice() -> None:
    assert "inside tensor" in refusal({"a": RIGHT, "b": RIGHT})


def test_hole_between_tensors() -> None:
    assert "after a hole" in refusal({"a": RIGHT, "b": {**RIGHT, "data_offsets": [28, 52]}}, size=52)


def test_hole_before_the_first_tensor() -> None:
    assert "after a hole" in refusal(with_x(data_offsets=[8, 32]), size=32)


def test_bytes_behind_the_last_tensor() -> None:
    assert "the tensors in model-00003.safetensors end at byte" in refusal(with_x(), size=25)


def test_git_lfs_pointer(path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9976576152\n"
    assert "git lfs pull" in file_refusal(path, pointer, CheckpointError)


def test_web_page(path: Path) -> None:
    assert "web page" in file_refusal(path, b"<!DOCTYPE html><html>Log in</html>", CheckpointError)


def test_gguf_under_another_name(path: Path) -> None:
    assert "GGUF" in file_refusal(path, b"GGUF\3\0\0\0" + bytes(64), UnsupportedError)


def test_pickle_under_another_name(path: Path) -> None:
    assert "if torch.save wrote it, give it the ending .bin" in file_refusal(
        path, b"PK\x03\x04" + bytes(64), UnsupportedError
    )


def test_no_such_file(path: Path) -> None:
    with pytest.raises(MissingShardError, match="there is no file"):
        read_header(path)


def test_broken_link(path: Path) -> None:
    path.symlink_to("blobs/gone")
    with pytest.raises(MissingShardError, match="broken link to blobs/gone"):
        read_header(path)


def test_link_to_itself(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_folder_of_that_name(path: Path) -> None:
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder where a weights file was expected"):
        read_header(path)


def test_pipe_of_that_name_does_not_wait(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(path)


def test_path_with_a_nul_byte() -> None:
    with pytest.raises(CheckpointError, match="null byte"):
        read_header("model\0.safetensors")


def test_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(to_bytes({"x": vector(1)}))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lamina.checkpoint.header.open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="change its permissions"):
        read_header(path)


def test_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(to_bytes({"x": vector(1)}))

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        read_header(path)


def test_file_cut_while_its_header_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(to_bytes({"x": vector(1)}))
    monkeypatch.setattr(os, "pread", lambda *_: b"{}")
    with pytest.raises(TruncatedError, match="became shorter"):
        read_header(path)


def test_a_file_of_zeros_is_refused(path: Path) -> None:
    # What a file system leaves behind when the machine goes down during a download.
    assert "is not JSON" in file_refusal(path, with_prefix(b"", bytes(4096)), HeaderError)
