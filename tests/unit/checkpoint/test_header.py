"""A right header gives the right extents; safetensors itself is the judge of what is right."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.make_safetensors import Spec, header_of, to_bytes, with_prefix, write
from lamina.checkpoint import DTYPE_BITS, DTYPE_BYTES, Extent, TensorEntry, parse_header, read_header
from lamina.errors import CheckpointError

TENSORS: dict[str, Spec] = {
    "embed.weight": ("BF16", [3, 2], bytes(range(12))),
    "nothing": ("F32", [0, 5], b""),
    "scale": ("F32", [], b"\0\0\x80?"),
    "packed": ("F4", [2, 3], b"abc"),
    "straße.weight": ("F8_E4M3", [5], b"fghij"),
}


def data_of(path: Path, entry: TensorEntry) -> bytes:
    with path.open("rb") as handle:
        handle.seek(entry.extent.offset)
        return handle.read(entry.extent.length)


def test_extents_lead_to_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", TENSORS)
    found = read_header(path)
    assert list(found) == list(TENSORS)
    for name, (dtype, shape, data) in TENSORS.items():
        entry = found[name]
        assert (entry.name, entry.dtype, entry.shape) == (name, dtype, tuple(shape))
        assert data_of(path, entry) == data


def test_extents_hold_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.safetensors", TENSORS)
    monkeypatch.chdir(tmp_path)
    assert read_header("model.safetensors")["scale"].extent.file == str(tmp_path / "model.safetensors")


def test_order_of_names_need_not_be_order_of_bytes() -> None:
    header = json.dumps(
        {
            "late": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
            "early": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]},
        }
    ).encode()
    found = parse_header(header, 8 + len(header) + 3, "hf://org/model@main/model.safetensors")
    assert found["late"].extent == Extent("hf://org/model@main/model.safetensors", 8 + len(header) + 2, 1)
    assert found["early"].extent.offset == 8 + len(header)


def test_header_may_end_with_spaces_and_hold_other_keys() -> None:
    header = b' {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "note": [1.5, null]}}   '
    assert parse_header(header, 8 + len(header) + 1, "f").keys() == {"x"}


def test_file_without_tensors_is_a_file() -> None:
    assert parse_header(b"{}", 10, "f") == {}
    assert parse_header(b'{"__metadata__": null}', 30, "f") == {}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype: str) -> None:
    raw = to_bytes({"x": (dtype, [8], bytes(DTYPE_BITS[dtype]))})
    assert safetensors.deserialize(raw)[0][1]["dtype"] == dtype
    (length,) = struct.unpack("<Q", raw[:8])
    assert parse_header(raw[8 : 8 + length], len(raw), "f")["x"].extent.length == DTYPE_BITS[dtype]


def test_bytes_table_leaves_out_what_is_packed() -> None:
    assert DTYPE_BYTES["BF16"] == 2 and DTYPE_BYTES["C64"] == 8
    assert "F4" not in DTYPE_BYTES and "F6_E2M3" not in DTYPE_BYTES


def test_fifty_thousand_tensors_are_read() -> None:
    header = json.dumps(
        {
            f"experts.{i}.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]}
            for i in range(50_000)
        }
    ).encode()
    found = parse_header(header, 8 + len(header) + 100_000, "f")
    assert found["experts.49999.weight"].extent.offset == 8 + len(header) + 99_998


def judge(raw: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What safetensors makes of a file; None where it refuses it."""
    try:
        return {
            name: (each["dtype"], each["shape"], bytes(each["data"])) for name, each in safetensors.deserialize(raw)
        }
    except safetensors.SafetensorError:
        return None


def ours(raw: bytes, path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except CheckpointError as exc:
        assert "\n" not in str(exc)
        return None
    return {name: (each.dtype, list(each.shape), data_of(path, each)) for name, each in found.items()}


RIGHT = to_bytes(TENSORS)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(st.integers(0, len(RIGHT) - 1))
def test_any_truncation_is_refused(tmp_path: Path, length: int) -> None:
    assert ours(RIGHT[:length], tmp_path / "f.safetensors") is None


@FEW
@given(st.lists(st.tuples(st.integers(0, len(RIGHT) - 1), st.binary(min_size=0, max_size=3)), min_size=1, max_size=4))
def test_a_mutated_file_is_refused_or_read_as_safetensors_reads_it(
    tmp_path: Path, edits: list[tuple[int, bytes]]
) -> None:
    raw = bytearray(RIGHT)
    for position, patch in edits:
        raw[position : position + len(patch)] = patch
    found = ours(bytes(raw), tmp_path / "f.safetensors")
    assert found is None or found == judge(bytes(raw))


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
SMALL = st.integers(0, 8)
INFO = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4"]) | VALUE,
        "shape": st.lists(SMALL, max_size=2) | VALUE,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | VALUE,
    }
)


@FEW
@given(st.dictionaries(st.sampled_from("abc"), INFO | VALUE, max_size=3) | VALUE, st.binary(max_size=8))
def test_an_invented_header_is_refused_or_read_as_safetensors_reads_it(
    tmp_path: Path, header: object, data: bytes
) -> None:
    raw = with_prefix(json.dumps(header).encode(), data)
    found = ours(raw, tmp_path / "f.safetensors")
    assert found == judge(raw)


@FEW
@given(st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F32", "I64"]), st.lists(st.integers(0, 3), max_size=3))))
def test_every_right_file_is_read(tmp_path: Path, drawn: list[tuple[str, list[int]]]) -> None:
    tensors: dict[str, Spec] = {}
    for number, (dtype, shape) in enumerate(drawn):
        count = DTYPE_BYTES[dtype]
        for size in shape:
            count *= size
        tensors[f"t{number}"] = (dtype, shape, bytes([number % 256]) * count)
    raw = to_bytes(tensors)
    assert ours(raw, tmp_path / "f.safetensors") == judge(raw) == tensors
    assert (
        json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]).keys() - {"__metadata__"} == header_of(tensors).keys()
    )
