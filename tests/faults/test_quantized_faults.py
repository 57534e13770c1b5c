"""Quantised checkpoints whose parts do not fit: one line that says what and where, never a wrong number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import quantize
from helpers.families import write_tiny
from lamina import AutoModel
from lamina.errors import CheckpointError, LaminaError, MissingTensorError, UnsupportedError

Q = "model.layers.1.self_attn.q_proj"
Change = Callable[[dict[str, torch.Tensor]], object]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
HQQ, TORCHAO = {"quant_method": "hqq"}, {"quant_method": "torchao"}
AO = f"{Q}._weight"
BITNET = {"quant_method": "bitnet", "linear_class": "bitlinear"}
QUARK = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}}
MLX = {"bits": 4, "group_size": 32}
VPTQ = quantize.vptq(8, 16, 4)
AQLM = quantize.aqlm(2, 16, 1, 8)
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def _drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


FAULTS = {
    "fp8 scales gone": (
        quantize.fp8((32, 32)), {"quant_method": "fp8"}, _drop(f"{Q}.weight_scale_inv"),
        CheckpointError, r"layers\.1\.self_attn\.q_proj\.weight is stored in .* as float8_e4m3fn, and no scales",
    ),
    "fp8 scales of another shape": (
        quantize.fp8((32, 32)), {"quant_method": "fp8"}, _put(f"{Q}.weight_scale_inv", torch.ones(3, 7)),
        CheckpointError, r"q_proj\.weight_scale_inv of shape \(3, 7\) does not fit .*q_proj\.weight of",
    ),
    "int8 scales gone": (
        quantize.bitsandbytes_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}, _drop(f"{Q}.SCB"),
        CheckpointError, r"q_proj\.weight is stored in .* as int8, and no scales",
    ),
    "gptq zero points gone": (
        quantize.gptq(4, 32), GPTQ, _drop(f"{Q}.qzeros"), CheckpointError, r"no tensor '.*qzeros' beside .*qweight",
    ),
    "gptq words gone": (
        quantize.gptq(4, 32), GPTQ, _drop(f"{Q}.qweight"), MissingTensorError, r"q_proj\.weight.*which no file",
    ),
    "gptq in another layout": (
        quantize.gptq(4, 32), {**GPTQ, "checkpoint_format": "marlin"}, _drop(f"{Q}.g_idx"),
        UnsupportedError, "'marlin'",
    ),
    "gptq scales of another shape": (
        quantize.gptq(4, 32), GPTQ, _put(f"{Q}.scales", torch.ones(2, 3)), CheckpointError, r"scales of shape \(2, 3\)",
    ),
    "awq for vectors": (
        quantize.awq(32), {"quant_method": "awq", "version": "gemv"}, _drop(f"{Q}.scales"), UnsupportedError, "'gemv'",
    ),
    "awq zero points of another shape": (
        quantize.awq(32), {"quant_method": "awq"}, _put(f"{Q}.qzeros", torch.ones(1, 8, dtype=torch.int32)),
        CheckpointError, "does not fit",
    ),
    "int4 whose bits nobody says": (
        quantize.pack_quantized(4, 32, True), {**INT4, "config_groups": {}}, _drop(f"{Q}.weight_shape"),
        CheckpointError, r"does not say how .*_proj is quantised",
    ),
    "int4 of other bits": (
        quantize.pack_quantized(8, 32, True), INT4, _drop(f"{Q}.weight_shape"), CheckpointError, "does not fit",
    ),
    "sparse": (
        quantize.pack_quantized(4, 32, True), {**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}},
        _drop(f"{Q}.weight_shape"), UnsupportedError, "sparse-24-bitmask",
    ),
    "bitsandbytes without a table": (
        quantize.bitsandbytes_4bit(64), BNB, _drop(f"{Q}.weight.quant_map"), CheckpointError, r"no tensor '.*_map'",
    ),
    "bitsandbytes with a torn state": (
        quantize.bitsandbytes_4bit(64), BNB,
        _put(f"{Q}.weight.quant_state.bitsandbytes__nf4", torch.tensor([123, 34], dtype=torch.uint8)),
        CheckpointError, r"quant_state\.bitsandbytes__nf4 in .* is no JSON",
    ),
    "bitsandbytes with a state of another weight": (
        quantize.bitsandbytes_4bit(64), BNB,
        _put(
            f"{Q}.weight.quant_state.bitsandbytes__nf4",
            torch.tensor(list(b'{"shape": [4, 4], "blocksize": 64}'), dtype=torch.uint8),
        ),
        CheckpointError, "does not fit",
    ),
    "bitsandbytes with an empty state": (
        quantize.bitsandbytes_4bit(64), BNB,
        _put(f"{Q}.weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8)),
        CheckpointError, "lacks shape or blocksize",
    ),
    "hqq zero points gone": (
        quantize.hqq(4, 32), HQQ, _drop(f"{Q}.zero"),
        CheckpointError, r"no tensor '.*q_proj\.zero'",
    ),
    "hqq scales of another shape": (
        quantize.hqq(4, 32), HQQ, _put(f"{Q}.scale", torch.ones(7, 1)),
        CheckpointError, r"scale of shape \(7, 1\) does",
    ),
    "hqq words of another number": (
        quantize.hqq(4, 32), HQQ, _put(f"{Q}.W_q", torch.ones(7, 32, dtype=torch.uint8)),
        CheckpointError, "does not fit",
    ),
    "hqq of a packing that is not known": (
        quantize.hqq(4, 32), HQQ, _put(f"{Q}.packing", torch.tensor(list(b"5bit"), dtype=torch.uint8)),
        CheckpointError, r"packing in .* says '5bit'",
    ),
    "hqq of a shape that is none": (
        quantize.hqq(4, 32), HQQ, _put(f"{Q}.shape", torch.ones(2)),
        CheckpointError, r"shape in .* is F32, not integers",
    ),
    "torchao scales gone": (
        quantize.torchao_by_row(torch.int8), TORCHAO, _drop(f"{AO}_scale"),
        CheckpointError, r"no tensor '.*_weight_scale'",
    ),
    "torchao scales of another shape": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_scale", torch.ones(2, 7)), CheckpointError, "does not fit",
    ),
    "torchao zero points of another shape": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_zero_point", torch.ones(2, 7)), CheckpointError, "does not fit",
    ),
    "torchao in tiles": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_scale_and_zero", torch.ones(2, 7)),
        UnsupportedError, "Int4TilePackedTo4dTensor",
    ),
    "torchao in nvfp4": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_qdata", torch.ones(64, 32, dtype=torch.uint8)),
        UnsupportedError, "NVFP4Tensor or MXTensor",
    ),
    "torchao that scales activations": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_act_pre_scale", torch.ones(64)),
        UnsupportedError, "act_pre_scale",
    ),
    "torchao in words": (
        quantize.torchao_int4(32), TORCHAO, _put(f"{AO}_qdata", torch.ones(64, 8, dtype=torch.int32)),
        UnsupportedError, "tensor of I32",
    ),
    "bitnet scales gone": (
        quantize.bitnet(True), BITNET, _drop(f"{Q}.weight_scale"),
        CheckpointError, r"no tensor '.*q_proj\.weight_scale' beside .*q_proj\.weight",
    ),
    "bitnet scales of another shape": (
        quantize.bitnet(True), BITNET, _put(f"{Q}.weight_scale", torch.ones(2)), CheckpointError, "does not fit",
    ),
    "bitnet with norms": (
        quantize.bitnet(True), {**BITNET, "use_rms_norm": True}, _drop(f"{Q}.weight_scale"),
        UnsupportedError, "a norm in each matrix",
    ),
    "bitnet that quantises as it goes": (
        quantize.bitnet(False), {**BITNET, "linear_class": "autobitlinear", "quantization_mode": "online"},
        _drop(f"{Q}.weight_scale"), UnsupportedError, "quantised at each use",
    ),
    "quanto data gone": (
        quantize.quanto(torch.int8), {"quant_method": "quanto"}, _drop(f"{Q}.weight._data"),
        CheckpointError, r"no tensor '.*_data' beside",
    ),
    "quanto scales of another shape": (
        quantize.quanto(torch.int8), {"quant_method": "quanto"}, _put(f"{Q}.weight._scale", torch.ones(7, 1)),
        CheckpointError, "does not fit",
    ),
    "quanto in four bits": (
        quantize.quanto(torch.int8), {"quant_method": "quanto"}, _put(f"{Q}.weight._data._data", torch.ones(7, 1)),
        UnsupportedError, "qint4 or qint2",
    ),
    "aqlm books gone": (
        AQLM, {"quant_method": "aqlm"}, _drop(f"{Q}.codebooks"),
        CheckpointError, r"no tensor '.*books'",
    ),
    "aqlm books of another number": (
        AQLM, {"quant_method": "aqlm"}, _put(f"{Q}.codebooks", torch.ones(3, 16, 1, 8)),
        CheckpointError, "does not fit",
    ),
    "aqlm scales of another shape": (
        AQLM, {"quant_method": "aqlm"}, _put(f"{Q}.scales", torch.ones(7, 1, 1, 1)), CheckpointError, "does not fit",
    ),
    "quark scales of another shape": (
        quantize.quark8, QUARK, _put(f"{Q}.weight_scale", torch.ones(7)), CheckpointError, "does not fit",
    ),
    "quark zero points of another shape": (
        quantize.quark8, QUARK, _put(f"{Q}.weight_zero_point", torch.ones(7)), CheckpointError, "does not fit",
    ),
    "quark in a scheme that is not known": (
        quantize.quark8, {"quant_method": "quark", "global_quant_config": {"weight": {"qscheme": "per_group"}}},
        _drop(f"{Q}.weight_zero_point"), UnsupportedError, "Quark's None per_group as I8",
    ),
    "quark in two steps": (
        quantize.quark8, {"quant_method": "quark", "global_quant_config": {"weight": [{}, {}]}},
        _drop(f"{Q}.weight_zero_point"), UnsupportedError, "does not say in one step",
    ),
    "quark that rotates": (
        quantize.quark8, {**QUARK, "algo_config": [{"name": "rotation", "r4": True}]},
        _drop(f"{Q}.weight_zero_point"), UnsupportedError, "rotations of activations",
    ),
    "quark int4 without zero points": (
        quantize.quark4(32, signed=True, ordered=False),
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group"}}},
        _drop(f"{Q}.weight_zero_point"), CheckpointError, r"no tensor '.*weight_zero_point' beside",
    ),
    "vptq tables gone": (*VPTQ, _drop(f"{Q}.res_centroids.weight"), CheckpointError, "no tensor '.*res_centroids"),
    "vptq tables of another size": (
        *VPTQ, _put(f"{Q}.centroids.weight", torch.ones(1, 8)), CheckpointError, "does not fit",
    ),
    "vptq of which nobody says how": (
        VPTQ[0], {"quant_method": "vptq"}, _drop(f"{Q}.perm"), CheckpointError, "does not say how .*_proj is quantised",
    ),
    "mlx without what is added": (
        quantize.mlx(4, 32), MLX, _drop(f"{Q}.biases"), CheckpointError, r"no tensor '.*q_proj\.biases' beside",
    ),
    "mlx scales of another shape": (
        quantize.mlx(4, 32), MLX, _put(f"{Q}.scales", torch.ones(64, 7)), CheckpointError, "does not fit",
    ),
    "mlx with one scale too few": (
        quantize.mlx(4, 32), MLX, _put(f"{Q}.biases", torch.ones(63, 2)),
        CheckpointError, "biases of shape .* does not fit",
    ),
    "mlx in other bits": (
        quantize.mlx(4, 32), {**MLX, "bits": 8}, _put("x", torch.ones(1)), CheckpointError, "does not fit",
    ),
    "mlx in another mode": (
        quantize.mlx(4, 32), {**MLX, "mode": "nvfp4"}, _drop(f"{Q}.biases"), UnsupportedError, "mode 'nvfp4'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault: str, tmp_path: Path) -> None:
    method, config, change, error, line = FAULTS[fault]
    write_tiny("llama", tmp_path / "plain", dtype=torch.bfloat16)
    folder = tmp_path / "quantized"
    quantize.write_quantized(tmp_path / "plain", folder, method, config)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=line) as caught:
        AutoModel.from_pretrained(str(folder), device="cpu")
    assert isinstance(caught.value, LaminaError)
    assert "\n" not in str(caught.value)


def test_a_config_that_says_quantised_over_weights_that_are_not(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantised with awq, but no tensor is"):
        AutoModel.from_pretrained(str(tmp_path), device="cpu")


def test_a_conv1d_is_refused_because_it_lies_across(tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path / "plain")
    folder = tmp_path / "quantized"
    wanted = re.compile(r".*attn\.c_proj\.weight")
    quantize.write_quantized(tmp_path / "plain", folder, quantize.gptq(4, 32), GPTQ, wanted)
    with pytest.raises(UnsupportedError, match=r"c_proj in .* is a quantised Conv1D"):
        AutoModel.from_pretrained(str(folder), device="cpu")
