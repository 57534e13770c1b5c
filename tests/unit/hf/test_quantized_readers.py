"""How quantised weights are found and unpacked, piece by piece."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import quantize
from helpers.families import tiny_config, write_tiny
from helpers.judge import streamed_model
from helpers.quantize import write_quantized
from lamina.checkpoint import Checkpoint, Extent, TensorEntry
from lamina.codec import codec, quantized_layouts
from lamina.codec.quantized_layouts import Codebooks, Gptq, Scaled, Ternary
from lamina.codec.unpacking import to_float, unpack
from lamina.errors import RequestError, UnsupportedError
from lamina.hf.building.quantized_readers import take_quantization, unpacked_state
from lamina.tensors.disk import DiskTensor
from lamina.tensors.expressions import Op, replay


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96])
def test_integers_of_any_width_come_back(bits: int, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, count))
    words = quantize.bits_of(values, bits)
    assert np.array_equal(unpack(words, bits, count).numpy(), values)


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 20])
def test_a_weight_is_the_same_however_many_rows_are_unpacked_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layouts, "CHUNK", chunk)
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    for method, make in {
        quantize.fp8((28, 40)): Scaled((200, 96), torch.float32, (8, 3), (28, 40)),
        quantize.gptq(3, 32, symmetric=False): Gptq((200, 96), torch.float32, 3, 32, 1),
        quantize.bitnet(True): Ternary((200, 96), torch.float32, 2, False, True),
        quantize.aqlm(3, 1024, 5, 8): Codebooks((200, 96), torch.float32),
    }.items():
        stored, numbers = method("x.weight", weight)
        assert np.array_equal(make(*stored.values()).numpy(), numbers)


@pytest.mark.parametrize("chunk", [1, 5000])
def test_vectors_in_rows_of_any_number(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_layouts, "CHUNK", chunk)
    for far, tables, length, bits in ((4, 1, 6, (4, 0)), (0, 2, 12, (4, 5)), (8, 1, 7, (16, 16))):
        method, _ = quantize.vptq(length, 1 << bits[0], 1 << bits[1] if bits[1] else 0, far, tables)
        stored, numbers = method("x.weight", torch.zeros(200, 96))
        parts = [name.removeprefix("x.").removesuffix(".weight") for name in stored]
        group = (96 - far) // tables
        whole = quantized_layouts.Vectors((200, 96), torch.float32, tuple(parts), length, 4, group, *bits)
        assert np.array_equal(whole(*stored.values()).numpy(), numbers)


@pytest.mark.parametrize(("bits", "group", "axis"), [(4, 48, 1), (3, 48, 1), (2, 64, 0), (3, 64, 0), (1, 16, 1)])
@pytest.mark.parametrize("chunk", [1, 5000])
def test_hqq_in_rows_of_any_number(
    bits: int, group: int, axis: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layouts, "CHUNK", chunk)
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    stored, numbers = quantize.hqq(bits, group, axis)("x.weight", weight)
    whole = quantized_layouts.Hqq((200, 96), torch.float32, bits, True, 200 * 96 // group, axis == 0)
    assert np.array_equal(whole(*(stored[f"x.{part}"] for part in ("W_q", "scale", "zero"))).numpy(), numbers)


def test_the_rows_of_all_experts_are_counted_through() -> None:
    one, two = (torch.full((4, 8), float(value)) for value in (1, 2))
    scales = torch.arange(1.0, 9.0).view(2, 2, 2)
    out = Scaled((2, 4, 8), torch.float32, (2, 2), (2, 4))(torch.stack((one, two)), scales)
    assert torch.equal(out[1, 2:, 4:], torch.full((2, 4), 16.0))
    assert torch.equal(out[0], torch.kron(scales[0], torch.ones(2, 4)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize("columns", [256, 128, 1, 85])
def test_every_code_of_eight_bits_is_torchs_number(dtype: torch.dtype, columns: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[: 255 if columns == 85 else 256].view(dtype).view(-1, columns)
    assert torch.equal(to_float(codes).nan_to_num(-1e9), codes.float().nan_to_num(-1e9))


@pytest.mark.parametrize(("first", "count"), [(0, 128), (32, 32), (32, 64), (32, 96), (96, 7)])
def test_rows_of_experts_that_lie_across_are_those_of_the_whole(first: int, count: int) -> None:
    weight = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
    stored, numbers = quantize.mxfp4_experts("x", weight)
    whole = quantized_layouts.Float4Experts((2, 64, 48), torch.float32, 32)
    assert np.array_equal(whole(*stored.values()).numpy(), numbers)
    rows = whole.rows(first, count, *stored.values())
    assert np.array_equal(rows.numpy(), numbers.reshape(128, 48)[first : first + count])


def test_a_zero_point_of_the_first_gptq_format_wraps() -> None:
    words = torch.zeros(1, 8, dtype=torch.int32)  # eight inputs of eight outputs, all 0
    zeros = torch.tensor([[-1]], dtype=torch.int32)  # eight times 15, which stands for 0
    out = Gptq((8, 8), torch.float32, 4, 8, 1)(words, zeros, torch.ones(1, 8, dtype=torch.float16))
    assert torch.equal(out, torch.zeros(8, 8))


def test_group_of_minus_one_is_no_group(tmp_path: Path) -> None:
    stored, numbers = quantize.pack_quantized(4, 32, True)("x.weight", torch.randn(32, 64))
    whole = quantized_layouts.Integers((32, 64), torch.float32, 4, 32, False)
    no_order = torch.full((64,), -1, dtype=torch.int32)
    assert np.array_equal(whole(stored["x.weight_packed"], stored["x.weight_scale"], no_order).numpy(), numbers)


def test_quantisation_is_found_in_a_text_model_inside_and_taken_out() -> None:
    config = tiny_config("llama4")
    config.text_config.quantization_config = {"quant_method": "fp8"}
    assert take_quantization(config) == {"quant_method": "fp8"}
    assert take_quantization(config) is None


@pytest.mark.parametrize("method", ["spqr", "higgs", "eetq", "auto-round"])
def test_a_method_that_is_not_known_is_named(method: str) -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": method}
    with pytest.raises(UnsupportedError, match=rf"quantised with '{method}.*known: fp8, .*gptq.*another checkpoint"):
        take_quantization(config)


def test_quantising_on_the_way_is_refused() -> None:
    from transformers import BitsAndBytesConfig

    config = tiny_config("llama")
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(RequestError, match="lamina split"):
        take_quantization(config)


def test_old_bitsandbytes_configs_name_no_method() -> None:
    config = tiny_config("llama")
    config.quantization_config = {"load_in_8bit": True}
    assert take_quantization(config) == {"load_in_8bit": True, "quant_method": "bitsandbytes"}


def _checkpoint(*entries: tuple[str, str, tuple[int, ...]], file: str = "/nowhere/x.safetensors") -> Checkpoint:
    tensors = {name: TensorEntry(name, dtype, shape, Extent(file, 0, 8)) for name, dtype, shape in entries}
    return Checkpoint("/nowhere", (file,), tensors)


def test_the_group_that_names_a_module_is_the_one(tmp_path: Path) -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
        "b": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "group_size": 16}},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    checkpoint = _checkpoint(
        ("m.up_proj.weight_packed", "I32", (8, 8)),
        ("m.up_proj.weight_scale", "BF16", (8, 2)),
        ("m.down_proj.weight_packed", "I32", (8, 16)),
        ("m.down_proj.weight_scale", "BF16", (8, 4)),
    )
    state = unpacked_state({}, checkpoint, config, None)
    bits = {name: _op(tensor).func.bits for name, tensor in state.items()}
    assert bits == {"m.up_proj.weight": 4, "m.down_proj.weight": 8}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_the_experts_of_a_checkpoint_in_one_fp8_tensor() -> None:
    checkpoint = _checkpoint(
        ("experts.gate_up_proj", "F8_E4M3", (3, 256, 128)), ("experts.gate_up_proj_scale_inv", "F32", (3, 2, 1))
    )
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tensor,) = unpacked_state({}, checkpoint, config, torch.float16).values()
    assert tuple(tensor.shape) == (3, 256, 128)
    assert _op(tensor).func.block == (128, 128)


def test_fp4_experts_beside_fp8(tmp_path: Path) -> None:
    checkpoint = _checkpoint(("w1.weight", "I8", (64, 32)), ("w1.scale", "F8_E8M0", (64, 2)))
    (tensor,) = unpacked_state({}, checkpoint, {"quant_method": "fp8"}, torch.bfloat16).values()
    assert tuple(tensor.shape) == (64, 64)
    stored = {"w1.weight": torch.full((64, 32), 0x21, dtype=torch.int8), "w1.scale": torch.full((64, 2), 4.0)}
    stored["w1.scale"] = stored["w1.scale"].to(torch.float8_e8m0fnu)
    out = replay(tensor.expression, stored.__getitem__)
    assert torch.equal(out[5, :4].float(), torch.tensor([2.0, 4.0, 2.0, 4.0]))


def test_the_tensors_that_are_not_quantised_stay(tmp_path: Path) -> None:
    quantize_one = quantize.fp8((32, 32))
    from helpers.families import write_tiny

    write_tiny("llama", tmp_path / "plain")
    quantize.write_quantized(tmp_path / "plain", tmp_path / "q", quantize_one, {"quant_method": "fp8"})
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    names = {name for name in tensors if name.endswith("norm.weight")}
    assert names
    checkpoint = _checkpoint(*((name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()))
    entries = {
        name: TensorEntry(name, "F8_E4M3" if tensors[name].dtype == torch.float8_e4m3fn else "F32", e.shape, e.extent)
        for name, e in checkpoint.tensors.items()
    }
    state = {name: DiskTensor.of(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    unpacked = unpacked_state(state, Checkpoint("/nowhere", (), entries), {"quant_method": "fp8"}, torch.float32)
    assert all(unpacked[name] is state[name] for name in names)
    assert not any(name.endswith("_scale_inv") for name in unpacked)


def _op(tensor: DiskTensor) -> Op:
    assert isinstance(tensor.expression, Op)
    return tensor.expression


def test_the_codecs_of_a_checkpoint_go_with_its_model(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "plain", dtype=torch.bfloat16)
    before = {*codec._codecs, *codec._lent}
    for rows in (32, 16):
        config = {"quant_method": "fp8", "weight_block_size": [rows, 32]}
        folder = tmp_path / str(rows) / "quantized"
        write_quantized(tmp_path / "plain", folder, quantize.fp8((rows, 32)), config)
        model = streamed_model(folder, 3 << 30)
        own = {*codec._codecs, *codec._lent} - before
        assert len(own) > 1 and all(f"block=({rows}, 32)" in name for name in own)
        model(torch.tensor([[5, 9]]))
        model.lamina.close()
        del model
        gc.collect()
        assert {*codec._codecs, *codec._lent} == before
