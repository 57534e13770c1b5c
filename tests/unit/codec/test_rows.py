"""Products of our own with plain weights: right, and the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codec import native, rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}  # of rounding once, or of fp32's sums
pytestmark = pytest.mark.skipif(not native.available(), reason=native.missing())


def case(tokens: int, count: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((tokens, columns), (count, columns), (count,))
    )
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, rows.MOST_ROWS), st.integers(1, 90), st.integers(1, 130), st.sampled_from(DTYPES), st.booleans())
def test_products_are_right_and_a_row_has_its_bits_in_any_company(
    tokens: int, count: int, columns: int, dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias = case(tokens, count, columns, dtype, tokens * 1000 + columns)
    out = rows.linear(x, weight, bias if with_bias else None)
    assert out is not None and out.dtype is dtype and out.shape == (tokens, count)
    exact = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert ((out.double() - exact).abs() <= ERROR[dtype] * exact.abs() + 1e-6 * size + 1e-7).all()
    alone = [rows.linear(row[None], weight, bias if with_bias else None) for row in x]
    assert torch.equal(out, torch.cat([one for one in alone if one is not None]))
    some = rows.linear(x, weight[count // 2 :], bias[count // 2 :] if with_bias else None)
    assert some is not None and torch.equal(out[:, count // 2 :], some)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(dtype: torch.dtype, threads: int) -> None:
    x, weight, bias = case(5, 700, 257, dtype)
    before = torch.get_num_threads()
    wanted = rows.linear(x, weight, bias)
    try:
        torch.set_num_threads(threads)
        found = rows.linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert wanted is not None and found is not None and torch.equal(wanted, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_used_where_they_lie(dtype: torch.dtype) -> None:
    """At any address that a number may have."""
    x, weight, _ = case(3, 33, 70, dtype)
    wanted = rows.linear(x, weight)
    for at in range(1, 5):
        memory = torch.zeros(at + weight.numel(), dtype=dtype)
        memory[at:] = weight.flatten()
        found = rows.linear(x, memory[at:].view(weight.shape))
        assert wanted is not None and found is not None and torch.equal(wanted, found)


def test_infinities_and_nans_stay_what_they_are() -> None:
    for dtype in DTYPES:
        x, weight, _ = case(2, 9, 40, dtype)
        x[0, 3], x[1, 39] = float("inf"), float("nan")
        out = rows.linear(x, weight)
        assert out is not None and out[0].isinf().all() and out[1].isnan().all()


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    x, weight, bias = case(3, 4, 8, torch.float32)
    assert rows.linear(x, weight.bfloat16()) is None
    assert rows.linear(x, case(3, 8, 4, torch.float32)[1].T) is None, "not in rows"
    assert rows.linear(case(rows.MOST_ROWS + 1, 4, 8, torch.float32)[0], weight) is None
    assert rows.linear(x.double(), weight.double()) is None
    assert rows.linear(x[:0], weight) is None
    assert rows.linear(x, weight, bias.bfloat16()) is None
    assert rows.linear(x, weight.clone().requires_grad_()) is None
    with torch.no_grad():
        assert rows.linear(x, weight.clone().requires_grad_()) is not None
    with native.switched_off():
        assert rows.linear(x, weight) is None
