"""bf16z: every bit comes back, at the promised size, whatever the bytes of a damaged panel say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lamina.codec import LOSSLESS, codec_for, native
from lamina.errors import ChangedError, CheckpointError

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and native.missing():
        pytest.skip(native.missing())
    with native.switched_off() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


def normal(rows: int, columns: int, deviation: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return (torch.randn(rows, columns, generator=generator) * deviation).bfloat16()


def encoded(block: torch.Tensor, panel_rows: int = 256) -> torch.Tensor:
    return LOSSLESS.encode(block, panel_rows, LOSSLESS.need(block, panel_rows))


def unpacked(panels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = torch.full((rows, columns), 7, dtype=torch.bfloat16)
    LOSSLESS.unpack(panels, rows, columns, out)
    return out


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def reference(panel: bytes, rows: int, columns: int) -> np.ndarray:
    """One panel, element by element, as the head of lossless.py says."""
    n = rows * columns
    chunks, runs = math.ceil(n / 4096), math.ceil(n / 256)
    table = panel[4:14]
    counts = np.frombuffer(panel[16 : 16 + 4 * chunks], "<u2").reshape(-1, 2).sum(0)
    raw = 16 + 4 * chunks
    firsts = raw + 256 * runs
    seconds = firsts + 64 * runs
    escapes = seconds + 48 * math.ceil(int(counts[0]) / 128)
    second = escape = 0
    bits = np.empty(n, np.uint16)
    for i in range(n):
        run, place = divmod(i, 256)
        code = panel[firsts + 64 * run + place % 64] >> 2 * (place // 64) & 3
        exponent = table[code]
        if code == 3:
            group, j = divmod(second, 128)
            at = seconds + 48 * group
            late = (panel[at + j % 32] >> 2 * (j // 32) & 3) | (panel[at + 32 + j % 16] >> j // 16 & 1) << 2
            exponent = table[3 + late] if late < 7 else panel[escapes + escape]
            second, escape = second + 1, escape + (late == 7)
        low = panel[raw + i]
        bits[i] = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    assert (second, escape) == tuple(counts)
    return bits.reshape(rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 255), (3, 257), (5, 1000), (2, 4096), (1, 4097)])
def test_the_bytes_are_what_the_definition_says(way: str, rows: int, columns: int) -> None:
    block = normal(rows, columns, 3.0)
    block[0, columns // 2 :] = PATTERNS[:: 65536 // columns][: columns - columns // 2]
    panel = encoded(block)
    assert np.array_equal(
        reference(bytes(panel[0].tolist()), rows, columns), block.view(torch.int16).numpy().view("u2")
    )
    assert same_bits(unpacked(panel, rows, columns), block)


@pytest.mark.parametrize("shape", [(256, 256), (1, 65536), (65536, 1), (16, 4096)])
@pytest.mark.parametrize("panel_rows", [16, 256])
def test_all_bit_patterns_come_back(way: str, shape: tuple[int, int], panel_rows: int) -> None:
    block = PATTERNS.view(shape)[:512]
    for some in (block, block.flip(0), block[:-1]):
        assert same_bits(unpacked(encoded(some.contiguous(), panel_rows), *some.shape), some.contiguous())


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 300))),
    st.integers(1, 48),
    st.sampled_from([0xFFFF, 0x83FF, 0x007F]),
)
def test_any_tensor_comes_back(bits: np.ndarray, panel_rows: int, mask: int) -> None:
    block = torch.from_numpy((bits & mask).view(np.int16)).view(torch.bfloat16)
    panels = encoded(block, panel_rows)
    assert same_bits(unpacked(panels, *block.shape), block)
    with native.switched_off():
        assert same_bits(unpacked(panels, *block.shape), block)


@pytest.mark.parametrize("deviation", [0.0175, 0.02, 0.026])
def test_normally_distributed_weights_take_two_thirds(deviation: float) -> None:
    block = normal(256, 2048, deviation)
    for panel_rows, most in [(256, 0.681), (16, 0.683)]:
        assert encoded(block, panel_rows).numel() <= most * block.nbytes


def test_panels_take_what_was_said(way: str) -> None:
    block = normal(600, 40)
    block[300] = PATTERNS[:40]
    need = LOSSLESS.need(block, 256)
    assert need == max(
        LOSSLESS.need(block[:256], 256), LOSSLESS.need(block[256:512], 256), LOSSLESS.need(block[512:], 256)
    )
    assert LOSSLESS.encode(block, 256, need).shape == (3, need)
    assert same_bits(unpacked(LOSSLESS.encode(block, 256, need + 1000), 600, 40), block)


def test_a_tensor_that_changed_since_it_was_measured_is_noticed(way: str) -> None:
    need = LOSSLESS.need(torch.zeros(40, 100, dtype=torch.bfloat16), 16)
    with pytest.raises(ChangedError, match=f"at most {need}: the tensor has changed"):
        LOSSLESS.encode(normal(40, 100), 16, need)


def test_both_encoders_write_the_same_bytes() -> None:
    if native.missing():
        pytest.skip(native.missing())
    for block in (PATTERNS.view(256, 256), normal(100, 333), normal(1, 5), PATTERNS[:1].expand(20, 20)):
        for panel_rows in (7, 64):
            panels = encoded(block, panel_rows)
            with native.switched_off():
                assert torch.equal(encoded(block, panel_rows), panels)


def test_a_tensor_that_would_not_shrink_is_better_plain() -> None:
    noise, weights, tiny = PATTERNS.view(256, 256), normal(256, 256), normal(1, 8)
    for block, wanted in [(noise, False), (weights, True), (tiny, False)]:
        assert LOSSLESS.saves(LOSSLESS.need(block, 256), 256, *block.shape) is wanted


def test_blocks_encode_alone(way: str) -> None:
    block = normal(80, 100)
    need = LOSSLESS.need(block, 16)
    parts = [LOSSLESS.encode(some, 16, need) for some in torch.split(block, 32)]
    assert torch.equal(LOSSLESS.encode(block, 16, need), torch.cat(parts))


def test_any_run_of_panels_unpacks_alone(way: str) -> None:
    block = normal(90, 100)
    panels = encoded(block, 16)
    for first, last in [(0, 1), (1, 3), (4, 6), (5, 6)]:
        rows = block[16 * first : 16 * last]
        assert same_bits(unpacked(panels[first:last], *rows.shape), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_types_are_what_torch_makes_of_bf16(way: str, dtype: torch.dtype) -> None:
    block = normal(40, 33, 3e4)
    out = torch.empty(40, 33, dtype=dtype)
    LOSSLESS.unpack(encoded(block, 16), 40, 33, out)
    assert torch.equal(out, block.to(dtype))


def test_panels_may_lie_at_any_address(way: str) -> None:
    block = normal(40, 333)
    panels = encoded(block, 16)
    room = torch.zeros(panels.numel() + 1, dtype=torch.uint8)
    room[1:] = panels.flatten()
    assert same_bits(unpacked(room[1:].view(panels.shape), 40, 333), block)


def test_threads_change_no_bit() -> None:
    block, before = normal(64, 4096), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same_bits(unpacked(encoded(block, 16), 64, 4096), block)
    finally:
        torch.set_num_threads(before)


def test_damaged_panels_stay_inside_and_most_are_noticed(way: str) -> None:
    """What lies around the output is not touched; counts and codes that disagree are an error."""
    rows, columns, generator = 20, 700, torch.Generator().manual_seed(3)
    panels = encoded(normal(rows, columns), 16)
    fixed = 16 + 4 * 3  # head and counts of a panel
    noticed = 0
    for attempt in range(60):
        bad = panels.clone()
        part = [bad[:, 16:fixed], bad[:, fixed + 64 * 44 :], bad[:, 4:]][attempt % 3]
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator) | (attempt % 2 * 0xF0))
        room = torch.full((rows + 20, columns), 7, dtype=torch.bfloat16)
        try:
            LOSSLESS.unpack(bad, rows, columns, room[10:-10])
        except CheckpointError as error:
            assert "damaged, split the model again" in str(error)
            noticed += 1
        assert (room[:10] == 7).all() and (room[-10:] == 7).all()
    assert noticed == 60


@pytest.mark.parametrize("head", [0, 1, 15, 17, 1 << 31, (1 << 32) - 1])
def test_a_wrong_number_of_rows_is_refused(way: str, head: int) -> None:
    panels = encoded(normal(40, 64), 16)
    panels[0, :4] = torch.tensor(list(head.to_bytes(4, "little")), dtype=torch.uint8)
    out = torch.zeros(40, 64, dtype=torch.bfloat16)
    try:
        LOSSLESS.unpack(panels, 40, 64, out)
    except CheckpointError:
        return
    assert head in (15, 17)  # three panels as well, and not to be told from the bytes alone


def test_panels_of_another_size_are_refused(way: str) -> None:
    panels = encoded(normal(40, 64), 16)
    for bad, rows in [(panels[:, :900].contiguous(), 40), (panels[:2], 40), (panels, 80)]:
        with pytest.raises(CheckpointError, match="the checkpoint's encoding is not that of its tensors"):
            LOSSLESS.unpack(bad, rows, 64, torch.empty(rows, 64, dtype=torch.bfloat16))


def test_no_rows_and_no_columns(way: str) -> None:
    for shape in [(0, 64), (3, 0)]:
        block = torch.empty(shape, dtype=torch.bfloat16)
        assert unpacked(encoded(block), *shape).shape == shape


def test_there_is_no_fused_product_and_it_is_found_by_name() -> None:
    block = normal(4, 64)
    assert codec_for("bf16z") is LOSSLESS
    assert not LOSSLESS.linear(torch.ones(1, 64, dtype=torch.bfloat16), encoded(block), 4, torch.empty(1, 4))
