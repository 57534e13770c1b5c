"""q4, q5, q6 and q8: what the bytes mean, by a slow definition, and that every way of computing agrees with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codec import AFFINE, Affine, codec_for, native
from lamina.codec.affine import LINEAR_TOKENS
from lamina.codec.fitting import TINY
from lamina.errors import CheckpointError

CODECS = list(AFFINE.values())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 31, 32, 33, 64, 100, 256, 257, 300, 801]


@pytest.fixture(params=CODECS, ids=lambda codec: codec.name)
def codec(request: pytest.FixtureRequest) -> Affine:
    found: Affine = request.param
    return found


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and native.missing():
        pytest.skip(native.missing())
    with native.switched_off() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


def weights(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def unpacked(codec: Affine, panels: torch.Tensor, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(panels), columns), float("nan"), dtype=dtype)
    codec.unpack(panels, len(panels), columns, out)
    return out


def bf16_at(row: bytes, at: int) -> float:
    return float(np.frombuffer(bytes(2) + row[at : at + 2], "<f4")[0])


def value_at(bits: int, row: bytes, columns: int, column: int) -> np.float32:
    """One weight, as the head of affine.py defines it, in double precision and rounded once."""
    if bits == 8:
        blocks, block = math.ceil(columns / 64), column // 64
        return np.float32(
            bf16_at(row, 2 * block) * int(np.int8(row[2 * blocks + column] - 256 * (row[2 * blocks + column] > 127)))
        )
    groups, (group, i) = math.ceil(columns / 32), divmod(column, 32)
    scale = bf16_at(row, 0) * row[4 + group]
    centre_code = row[4 + groups + group]
    centre = bf16_at(row, 2) * (centre_code - 256 * (centre_code > 127))
    nibbles, high = 4 + 2 * groups, 4 + 18 * groups
    code = row[nibbles + 16 * group + i % 16] >> 4 * (i // 16) & 15
    top = bits - 4
    word = int.from_bytes(row[high + 4 * top * group : high + 4 * top * (group + 1)], "little")
    code |= (word >> top * i & (2**top - 1)) << 4
    return np.float32(scale * (code - 2 ** (bits - 1)) + centre)


def random_panels(codec: Affine, rows: int, columns: int) -> torch.Tensor:
    """Every code, scale and centre, in panels that no encoder would write."""
    generator = torch.Generator().manual_seed(columns)
    panels = torch.randint(0, 256, (rows, codec.panel_bytes(columns)), dtype=torch.uint8, generator=generator)
    units = 2 if codec.bits < 8 else math.ceil(columns / 64)
    panels[:, : 2 * units] = (torch.rand(rows, units, generator=generator) * 1e-3).bfloat16().view(torch.uint8)
    return panels


@pytest.mark.parametrize("columns", WIDTHS)
def test_unpacking_is_what_the_definition_says(codec: Affine, way: str, columns: int) -> None:
    panels = random_panels(codec, 3, columns)
    rows = [bytes(row.tolist()) for row in panels]
    wanted = np.array([[value_at(codec.bits, row, columns, i) for i in range(columns)] for row in rows], np.float32)
    assert np.array_equal(unpacked(codec, panels, columns).numpy(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_unpacked_is_rounded_once(codec: Affine, way: str, dtype: torch.dtype) -> None:
    panels = random_panels(codec, 5, 777)
    panels[:, 1::2][:, :1] = torch.tensor([[0x30], [0x3A], [0x44], [0x47], [0x01]])  # fp16 under- and overflows too
    full = unpacked(codec, panels, 777)
    assert torch.equal(unpacked(codec, panels, 777, dtype), full.to(dtype))


def test_float64_is_unpacked_too(codec: Affine) -> None:
    panels = codec.encode(weights(2, 70))
    assert torch.equal(unpacked(codec, panels, 70, torch.float64), unpacked(codec, panels, 70).double())


def test_panels_may_lie_at_any_address(codec: Affine, way: str) -> None:
    panels = codec.encode(weights(4, 320))
    room = torch.zeros(panels.numel() + 3, dtype=torch.uint8)
    room[3:] = panels.flatten()
    assert torch.equal(unpacked(codec, room[3:].view(panels.shape), 320), unpacked(codec, panels, 320))


@pytest.mark.parametrize("columns", [1, 40, 4096])
def test_both_encoders_write_the_same_bytes(codec: Affine, columns: int) -> None:
    if native.missing():
        pytest.skip(native.missing())
    block = torch.cat(
        [weights(40, columns), weights(4, columns).abs() + 3, torch.zeros(1, columns), weights(300, columns) * 1e30]
    )
    block[5, 0] = 100
    panels = codec.encode(block)
    with native.switched_off():
        assert torch.equal(codec.encode(block), panels)


def test_a_row_becomes_the_same_bytes_in_any_company(codec: Affine, way: str) -> None:
    block = weights(150, 1000)  # more than is fitted in one step
    alone = [codec.encode(block[row : row + 1]) for row in range(0, 150, 7)]
    assert torch.equal(codec.encode(block)[::7], torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_normally_distributed_weights(codec: Affine, dtype: torch.dtype) -> None:
    block = weights(32, 2048, dtype)
    error = unpacked(codec, codec.encode(block), 2048) - block.float()
    assert error.norm() / block.float().norm() < {4: 0.0705, 5: 0.0347, 6: 0.0171, 8: 0.0062}[codec.bits]


def test_bits_a_weight() -> None:
    assert {codec.name: codec.panel_bytes(4096) * 8 / 4096 for codec in CODECS} == {
        "q4": 4.5 + 32 / 4096,
        "q5": 5.5 + 32 / 4096,
        "q6": 6.5 + 32 / 4096,
        "q8": 8.25,
    }


def test_zeros_and_the_ends_of_the_range_come_back(codec: Affine, way: str) -> None:
    block = torch.tensor([[0.0] * 64, [-0.0] * 64, [3e38] * 64, [1e-40] * 64, [3e38, -3e38] * 32])
    got = unpacked(codec, codec.encode(block), 64)
    assert torch.equal(got[:2], torch.zeros(2, 64))
    assert torch.isfinite(got).all()
    assert torch.allclose(got[2:], block[2:], rtol=0.07, atol=1e-39)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(codec: Affine, bad: float) -> None:
    block = weights(2, 100)
    block[1, 99] = bad
    with pytest.raises(CheckpointError, match="store the checkpoint lossless"):
        codec.encode(block)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70), st.floats(1e-20, 1e20))
def test_no_weight_is_farther_off_than_its_range_allows(which: int, row: list[float], size: float) -> None:
    codec = CODECS[which]
    block = torch.tensor([row]) * size
    error = (unpacked(codec, codec.encode(block), len(row)) - block).abs().max()
    # A quarter of the widest group for what is clipped, and the rounding of centres, which knows the row's greatest.
    spread = block.max() - block.min()
    assert error <= 0.25 * spread + block.abs().max() / 100 + 128 * TINY  # what is smaller is zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 64, 300, 1024])
def test_linear_is_the_product(codec: Affine, dtype: torch.dtype, columns: int) -> None:
    if native.missing():
        pytest.skip(native.missing())
    panels, x = codec.encode(weights(37, columns)), torch.randn(7, columns).to(dtype)
    out = torch.full((7, 50), float("nan"), dtype=dtype)
    assert codec.linear(x, panels, 37, out[:, :37])
    wanted = x.double() @ unpacked(codec, panels, columns).double().T
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    size = x.double().abs() @ unpacked(codec, panels, columns).double().abs().T
    assert ((out[:, :37].double() - wanted).abs() <= tolerance * wanted.abs() + 1e-6 * size + 1e-7).all()
    assert out[:, 37:].isnan().all()


def test_linear_depends_on_nothing_beside(codec: Affine) -> None:
    if native.missing():
        pytest.skip(native.missing())
    panels, x = codec.encode(weights(77, 600)), torch.randn(LINEAR_TOKENS, 600)
    out = torch.empty(LINEAR_TOKENS, 77)
    assert codec.linear(x, panels, 77, out)
    for tokens in range(1, LINEAR_TOKENS):
        few = torch.empty(tokens, 77)
        assert codec.linear(x[-tokens:], panels, 77, few)
        assert torch.equal(few, out[-tokens:])
    for first, last in [(0, 1), (1, 6), (33, 77), (76, 77)]:
        block = torch.empty(LINEAR_TOKENS, last - first)
        assert codec.linear(x, panels[first:last], last - first, block)
        assert torch.equal(block, out[:, first:last])


def test_threads_change_no_bit(codec: Affine) -> None:
    if native.missing():
        pytest.skip(native.missing())
    panels, x, before = codec.encode(weights(300, 512)), torch.randn(3, 512), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = torch.empty(3, 300)
            assert codec.linear(x, panels, 300, out)
            results.append((out, unpacked(codec, panels, 512), codec.encode(weights(300, 512))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_linear_says_when_it_has_nothing_to_offer(codec: Affine) -> None:
    panels, out = codec.encode(weights(4, 64)), torch.zeros(LINEAR_TOKENS + 1, 4)
    assert not codec.linear(torch.ones(LINEAR_TOKENS + 1, 64), panels, 4, out)
    assert not codec.linear(torch.ones(1, 64, dtype=torch.float64), panels, 4, out[:1].double())
    with native.switched_off():
        assert not codec.linear(torch.ones(1, 64), panels, 4, out[:1])
    assert torch.equal(out, torch.zeros_like(out))


def test_panels_of_another_size_are_refused(codec: Affine, way: str) -> None:
    panels = codec.encode(weights(4, 64))
    for bad, rows in [(panels[:, :-1].contiguous(), 4), (panels, 5), (panels, 3)]:
        with pytest.raises(CheckpointError, match=rf"{codec.name} are {rows} panels"):
            codec.unpack(bad, rows, 64, torch.empty(rows, 64))


def test_no_rows(codec: Affine, way: str) -> None:
    panels = codec.encode(torch.empty(0, 64))
    assert panels.shape == (0, codec.panel_bytes(64))
    assert unpacked(codec, panels, 64).shape == (0, 64)


def test_they_are_found_by_name() -> None:
    assert [codec_for(name).name for name in ("q4", "q5", "q6", "q8")] == ["q4", "q5", "q6", "q8"]
