"""Products for drafts: as exact as 8 bits of x allow, the same bits whatever else is in the call, by every path."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lamina.codec import AFFINE, LOSSLESS, Affine, native
from lamina.codec.affine import LINEAR_TOKENS
from lamina.errors import CheckpointError
from lamina.plan.schedule import PanelSpan
from lamina.tensors.packed import PackedTensor, Scratch

CODECS = list(AFFINE.values())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 33, 100, 512, 1100]
ROWS = 7
SIMPLER = {"avx2": ("-march=x86-64-v3",), "plain": ("-march=x86-64", "-DQUICKER=1")}  # for other processors than this


@pytest.fixture(params=CODECS, ids=lambda codec: codec.name)
def codec(request: pytest.FixtureRequest) -> Affine:
    found: Affine = request.param
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, native._State]:
    """The kernels with fewer instructions than this processor has."""
    compiler, states = shutil.which("cc"), {}
    if compiler is None or platform.machine() != "x86_64":
        return {}
    for name, flags in SIMPLER.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "VARIANTS", (flags,))
            patch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))  # compiles in half the time
            target = tmp_path_factory.mktemp(name) / "kernels.so"
            native._compile(compiler, target)
        states[name] = native._State()
        states[name].tried, states[name].library = True, native._open(target)
    return states


@pytest.fixture(params=["this processor", *SIMPLER])
def path(request: pytest.FixtureRequest, compiled: dict[str, native._State]) -> Iterator[str]:
    if native.missing():
        pytest.skip(native.missing())
    if request.param in SIMPLER:
        if request.param not in compiled:
            pytest.skip("not this kind of processor")
        if request.param == "avx2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX2")
    with pytest.MonkeyPatch.context() as patch:
        if request.param in SIMPLER:
            patch.setattr(native, "_state", compiled[request.param])
        skip_unless_quicker()
        yield request.param


def skip_unless_quicker() -> None:
    panels = AFFINE["q4"].encode(torch.ones(1, 32))
    if not AFFINE["q4"].linear_quick(torch.ones(1, 32), panels, 1, torch.empty(1, 1)):
        pytest.skip("this processor has no quick products")


def random_panels(codec: Affine, rows: int, columns: int) -> torch.Tensor:
    """Every code, scale and centre, in panels that no encoder would write."""
    generator = torch.Generator().manual_seed(columns)
    panels = torch.randint(0, 256, (rows, codec.panel_bytes(columns)), dtype=torch.uint8, generator=generator)
    units = 2 if codec.bits < 8 else math.ceil(columns / 64)
    panels[:, : 2 * units] = (torch.rand(rows, units, generator=generator) * 1e-3).bfloat16().view(torch.uint8)
    return panels


def unpacked(codec: Affine, panels: torch.Tensor, columns: int) -> torch.Tensor:
    out = torch.empty(len(panels), columns)
    codec.unpack(panels, len(panels), columns, out)
    return out.double()


def tokens(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes from group to group."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.repeat_interleave(torch.rand(count, columns // 32 + 1, generator=generator) ** 4, 32, dim=1)
    return (torch.randn(count, columns, generator=generator) * sizes[:, :columns] * 10).to(dtype)


def quick(codec: Affine, x: torch.Tensor, panels: torch.Tensor) -> torch.Tensor:
    """In the middle of a larger result, the rest of which is left alone."""
    rows = len(panels)
    around = torch.full((len(x), rows + 2), 7.0, dtype=x.dtype)
    assert codec.linear_quick(x, panels, rows, around[:, 1:-1])
    assert (around[:, 0] == 7).all() and (around[:, -1] == 7).all()
    return around[:, 1:-1].clone()


def tolerance(codec: Affine, x: torch.Tensor, panels: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Half a step of each group of 32 columns, times the weights without their centres, which multiply x as it is;
    and what fp32 and the type of the result round."""
    scaled, columns = unpacked(codec, panels, x.shape[1]), x.shape[1]
    if codec.bits < 8:
        without = panels.clone()
        without[:, :2] = 0
        scaled = scaled - unpacked(codec, without, columns)
    groups = torch.nn.functional.pad(x.double().abs(), (0, -columns % 32)).view(len(x), -1, 32)
    half_step = groups.amax(2, keepdim=True).expand_as(groups).flatten(1)[:, :columns] / 127 / 2
    sums = 1e-5 * x.double().abs() @ unpacked(codec, panels, columns).abs().T
    return half_step @ scaled.abs().T + sums + torch.finfo(x.dtype).eps * want.abs() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_x_in_8_bits(codec: Affine, path: str, dtype: torch.dtype) -> None:
    for columns in WIDTHS:
        panels, x = random_panels(codec, ROWS, columns), tokens(3, columns, dtype)
        want = x.double() @ unpacked(codec, panels, columns).T
        for some in (x, x[:1]):
            off = (quick(codec, some, panels).double() - want[: len(some)]).abs()
            assert (off <= tolerance(codec, some, panels, want[: len(some)])).all(), (columns, len(some))


def test_what_8_bits_hold_is_exact(codec: Affine, path: str) -> None:
    """Nothing but sums is rounded then: a wrong sign, offset or column would show, however small."""
    for columns in (100, 801):
        panels = random_panels(codec, ROWS, columns)
        x = torch.randint(-127, 128, (2, columns), generator=torch.Generator().manual_seed(0)).float()
        x[:, ::32] = 127.0
        want = x.double() @ unpacked(codec, panels, columns).T
        assert torch.allclose(quick(codec, x, panels).double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_extreme_codes_do_not_overflow(codec: Affine, path: str) -> None:
    panels = random_panels(codec, ROWS, 512)
    codes = 16 if codec.bits == 8 else 4 + 32
    for byte in (0, 0x7F, 0x80, 0xFF):
        panels[:, codes:] = byte
        for sign in (-1.0, 1.0):
            x = torch.full((1, 512), sign)
            want = x.double() @ unpacked(codec, panels, 512).T
            assert torch.allclose(quick(codec, x, panels).double(), want, rtol=1e-4, atol=1e-5)


def test_a_row_depends_on_nothing_else_in_the_call(codec: Affine, path: str) -> None:
    for columns, dtype in ((801, torch.float32), (1024, torch.bfloat16), (5000, torch.float16)):
        panels, x = random_panels(codec, ROWS, columns), tokens(LINEAR_TOKENS, columns, dtype)
        whole = quick(codec, x, panels)
        for count in (1, 2, 3, 4, 5, 7, 8, 15):
            assert torch.equal(quick(codec, x[-count:], panels), whole[-count:]), count
        for row in range(ROWS):
            assert torch.equal(quick(codec, x[:2], panels[row : row + 1]), whole[:2, row : row + 1])


def test_many_rows_in_several_threads(codec: Affine) -> None:
    skip_unless_quicker()
    panels, x = random_panels(codec, 4200, 128), tokens(2, 128, torch.float32)
    parts = [quick(codec, x, part) for part in panels.split(1000)]  # too few for a second thread
    assert torch.equal(quick(codec, x, panels), torch.cat(parts, 1))


def test_what_is_no_number_gives_none(codec: Affine, path: str) -> None:
    panels = random_panels(codec, ROWS, 100)
    for bad in (float("nan"), float("inf")):
        x = tokens(2, 100, torch.float32)
        x[1, 40] = bad
        out = quick(codec, x, panels)
        assert out[0].isfinite().all() and not out[1].isfinite().any()
    for small in (0.0, 1e-38):
        assert (quick(codec, torch.full((1, 100), small), panels).abs() < 1e-30).all()


def test_it_is_left_alone_where_it_does_not_apply(codec: Affine) -> None:
    panels, out = random_panels(codec, ROWS, 64), torch.full((LINEAR_TOKENS + 1, ROWS), 7.0)
    x = torch.randn(LINEAR_TOKENS + 1, 64)
    assert not codec.linear_quick(x, panels, ROWS, out)
    assert not codec.linear_quick(x[:2].double(), panels, ROWS, out[:2].double())
    with native.switched_off():
        assert not codec.linear_quick(x[:2], panels, ROWS, out[:2])
    assert (out == 7).all()
    if not native.missing():
        with pytest.raises(CheckpointError, match=f"{codec.name} are 7 panels"):
            codec.linear_quick(x[:2, :30].contiguous(), panels[:, 1:], ROWS, out[:2])


def test_which_codecs_have_one() -> None:
    assert all(codec.has_quick for codec in CODECS) and not LOSSLESS.has_quick


def weight(
    codec: Affine, panels: torch.Tensor, columns: int, cuts: tuple[int, ...], shape: tuple[int, ...]
) -> PackedTensor:
    nbytes, ends = panels.shape[1], (*cuts, len(panels))
    spans = tuple(
        PanelSpan(codec.name, first * nbytes, last - first, 1, nbytes, last - first, 0, last - first)
        for first, last in zip((0, *cuts), ends, strict=True)
    )
    return PackedTensor(shape, torch.float32, panels.flatten(), spans, Scratch())


@pytest.mark.parametrize("cuts", [(), (3,)], ids=["one span", "two spans"])
def test_a_linear_of_a_quick_weight_takes_it(codec: Affine, cuts: tuple[int, ...]) -> None:
    skip_unless_quicker()
    panels, x, bias = random_panels(codec, ROWS, 100), torch.randn(2, 1, 100), torch.randn(ROWS)
    quickly = quick(codec, x.view(2, 100), panels).view(2, 1, ROWS)
    linear, packed = torch.nn.functional.linear, weight(codec, panels, 100, cuts, (ROWS, 100))
    slowly = linear(x, packed)
    assert not torch.equal(slowly, quickly)
    packed.quick = True
    assert torch.equal(linear(x, packed), quickly)
    assert torch.equal(linear(x, packed, bias), quickly + bias)
    assert torch.equal(linear(input=x, weight=packed, bias=bias), quickly + bias)
    assert torch.equal(linear(x[0, 0], packed), quickly[0, 0])
    assert torch.equal(linear(x.view(100, 2).T.contiguous().T.reshape(2, 100), packed), quickly[:, 0])
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(linear(strided, packed), quickly)
    many = torch.randn(LINEAR_TOKENS + 1, 100)
    assert torch.allclose(linear(many, packed), linear(many, packed.unpack()), atol=1e-4)
    with native.switched_off():
        assert torch.allclose(linear(x, packed), slowly, atol=1e-4)
    packed.quick = False
    assert torch.equal(linear(x, packed), slowly)


def test_wrong_columns_are_refused() -> None:
    packed = weight(AFFINE["q4"], random_panels(AFFINE["q4"], ROWS, 100), 100, (), (ROWS, 100))
    packed.quick = True
    with pytest.raises((RuntimeError, CheckpointError)):
        torch.nn.functional.linear(torch.randn(2, 50), packed)


def test_parts_of_a_quick_weight_are_quick() -> None:
    packed = weight(AFFINE["q4"], random_panels(AFFINE["q4"], 6, 64), 64, (), (2, 3, 64))
    assert not packed[1].quick and not packed.view(6, 64).quick
    packed.quick = True
    assert packed[1].quick and packed.view(6, 64).quick and packed.expert(0).quick
