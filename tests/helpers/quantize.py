"""Writes a checkpoint again as the methods of quantisation store it, and once more with the numbers that come out.

The definitions here are in numpy, element by element where that is possible, and share nothing with Lamina's.
This module knows nothing of Lamina: it only makes inputs for the tests.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Stored = dict[str, torch.Tensor]
Method = Callable[[str, torch.Tensor], tuple[Stored, np.ndarray]]
LINEAR = re.compile(r".*layers\..*(?<!norm)(?<!\.gate)(?<!router)(?<!conv1d)\.weight")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def write_quantized(
    plain: Path, folder: Path, method: Method, config: Mapping[str, Any], wanted: str | re.Pattern[str] = LINEAR
) -> Path:
    """Quantise the matrices of a checkpoint whose names match.

    Args:
        plain: a folder with one `model.safetensors`.
        folder: where the quantised checkpoint goes; beside it, in `unpacked`, goes what it must mean.
        method: what is stored for a weight, by full names, and the numbers that it stands for.
        config: the `quantization_config`.
        wanted: which names.

    Returns:
        The folder of the unpacked checkpoint.
    """
    unpacked = folder.parent / "unpacked"
    tensors = load_file(plain / "model.safetensors")
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if re.fullmatch(wanted, name) and tensor.dim() > 1:
            parts, numbers = method(name, tensor.float())
            assert numbers.shape == tuple(tensor.shape)
            stored |= parts
            meant[name] = torch.from_numpy(np.ascontiguousarray(numbers)).to(tensor.dtype)
        else:
            stored[name] = meant[name] = tensor
    assert len(stored) > len(tensors), "nothing was quantised"
    for where, content in ((folder, stored), (unpacked, meant)):
        shutil.copytree(plain, where)
        save_file(
            {k: v.contiguous().clone() for k, v in content.items()}, where / "model.safetensors", {"format": "pt"}
        )
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": dict(config)}))
    return unpacked


def fp8(block: tuple[int, int], suffix: str = "weight_scale_inv", exponents: bool = False) -> Method:
    """FP8 in blocks: an E4M3 number for each element, a scale for each block: float32, or a byte of exponent."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        rows, columns = weight.shape
        grid = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
        quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        numbers = np.empty(weight.shape, np.float32)
        for i, j in np.ndindex(*grid.shape):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale = np.float32(weight[part].abs().max()) / 448
            grid[i, j] = np.exp2(np.ceil(np.log2(scale))) if exponents else scale
            quantized[part] = (weight[part] / float(grid[i, j])).to(torch.float8_e4m3fn)
            numbers[part] = quantized[part].float().numpy() * grid[i, j]
        scales = torch.from_numpy((np.log2(grid) + 127).astype(np.uint8) if exponents else grid)
        return {name: quantized, name.removesuffix("weight") + suffix: scales}, numbers

    return store


def fp8_by_row(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """FP8 with a bf16 scale for each row, as compressed-tensors has it."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    quantized = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {name: quantized, f"{name}_scale": scale}, quantized.float().numpy() * scale.float().numpy()


def int8_by_row(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    quantized = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: quantized, f"{name}_scale": scale}, quantized.numpy() * scale.float().numpy()


def mxfp4_experts(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """gpt-oss: (experts, inputs, outputs) as bytes (experts, outputs, groups of 32 inputs, 16), low nibble first."""
    across = weight.transpose(1, 2).numpy()
    experts, rows, columns = across.shape
    grouped = across.reshape(experts, rows, columns // 32, 32)
    exponent = np.ceil(np.log2(np.abs(grouped).max(-1) / 6 + 1e-20))
    scaled = grouped / np.exp2(exponent)[..., None]
    index = np.abs(scaled[..., None] - E2M1).argmin(-1).astype(np.uint8)
    packed = index[..., 0::2] | index[..., 1::2] << 4
    scales = (exponent + 127).astype(np.uint8)
    numbers = (E2M1[index] * np.exp2(exponent)[..., None].astype(np.float32)).reshape(across.shape)
    return (
        {f"{name}_blocks": torch.from_numpy(packed), f"{name}_scales": torch.from_numpy(scales)},
        np.swapaxes(numbers, 1, 2),
    )


def nvfp4(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' nvfp4-pack-quantized: groups of 16, FP8 scales, one number that these are divided by."""
    values = weight.numpy().reshape(weight.shape[0], -1, 16)
    most = np.abs(values).max(-1)
    whole = np.float32(448 * 6 / most.max())
    scales = torch.from_numpy(most / 6 * whole).to(torch.float8_e4m3fn)
    real = scales.float().numpy() / whole
    index = np.abs((values / np.maximum(real, 1e-12)[..., None])[..., None] - E2M1).argmin(-1).astype(np.uint8)
    packed = (index[..., 0::2] | index[..., 1::2] << 4).reshape(weight.shape[0], -1)
    numbers = (E2M1[index] * real[..., None]).reshape(tuple(weight.shape))
    stored = {
        f"{name}_packed": torch.from_numpy(packed),
        f"{name}_scale": scales,
        f"{name}_global_scale": torch.tensor([whole]),
    }
    return stored, numbers


def affine(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers (rows, columns), zero points and fp16 scales (rows, groups) of groups along the columns."""
    most = (1 << bits) - 1
    grouped = weight.reshape(weight.shape[0], -1, group)
    if symmetric:
        scale = (np.abs(grouped).max(-1) * 2 / most).astype(np.float16)
        zero = np.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = grouped.min(-1), grouped.max(-1)
        scale = ((high - low) / most).astype(np.float16)
        zero = np.clip(np.round(-low / scale.astype(np.float32)), 1, most).astype(int)
    values = np.round(grouped / scale.astype(np.float32)[..., None]) + zero[..., None]
    return np.clip(values, 0, most).astype(int).reshape(weight.shape), zero, scale


def meaning(values: np.ndarray, zero: np.ndarray, scale: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    return (values - zero[:, group_of]).astype(np.float32) * scale.astype(np.float32)[:, group_of]


def bits_of(values: np.ndarray, bits: int) -> torch.Tensor:
    """Each row of integers as one stream of bits, lowest first, in int32 words."""
    stream = ((values[..., None] >> np.arange(bits)) & 1).reshape(len(values), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def gptq(bits: int, group: int, *, symmetric: bool = True, second: bool = False, ordered: bool = False) -> Method:
    """`ordered`: columns belong to groups in an order of their own; `second`: zero points are stored as they are."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        columns = weight.shape[1]
        order = np.random.default_rng(0).permutation(columns) if ordered else np.arange(columns)
        values, zero, scale = affine(weight.numpy()[:, order], bits, group, symmetric)
        group_of = np.empty(columns, int)
        group_of[order] = np.arange(columns) // group
        back = np.argsort(order)
        module = name.removesuffix("weight")
        stored = {
            f"{module}qweight": bits_of(values[:, back], bits).t(),
            f"{module}qzeros": bits_of((zero - (0 if second else 1)).T, bits),
            f"{module}scales": torch.from_numpy(scale.T.copy()),
            f"{module}g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        return stored, meaning(values[:, back], zero, scale, group_of)

    return store


def awq(group: int) -> Method:
    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        values, zero, scale = affine(weight.numpy(), 4, group, symmetric=False)
        module = name.removesuffix("weight")

        def words(by_input: np.ndarray) -> torch.Tensor:
            packed = np.zeros((by_input.shape[0], by_input.shape[1] // 8), np.uint32)
            for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed |= by_input[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
            return torch.from_numpy(packed.view(np.int32))

        stored = {
            f"{module}qweight": words(values.T),
            f"{module}qzeros": words(zero.T),
            f"{module}scales": torch.from_numpy(scale.T.copy()),
        }
        return stored, meaning(values, zero, scale, np.arange(weight.shape[1]) // group)

    return store


def pack_quantized(bits: int, group: int, symmetric: bool) -> Method:
    """compressed-tensors' pack-quantized, with bf16 scales."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        values, zero, scale = affine(weight.numpy(), bits, group, symmetric)
        scales = torch.from_numpy(scale).bfloat16()
        stored = {
            f"{name}_packed": bits_of(values, bits),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored[f"{name}_zero_point"] = bits_of(zero.T, bits).t()
        return stored, meaning(values, zero, scales.float().numpy(), np.arange(weight.shape[1]) // group)

    return store


def bitsandbytes_8bit(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    most = weight.abs().amax(1)
    quantized = (weight / most[:, None] * 127).round().to(torch.int8)
    module = name.removesuffix("weight")
    stored = {name: quantized, f"{module}SCB": most, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, quantized.numpy() * (most.numpy()[:, None] * np.float32(1 / 127))


def bitsandbytes_4bit(block: int, nested: int = 0) -> Method:
    """A table of 16 numbers, the upper nibble first; with `nested`, absmax is itself places in a table of 256."""
    table = np.sort(np.random.default_rng(1).uniform(-1, 1, 16)).astype(np.float32)
    wide = np.linspace(-1, 1, 256, dtype=np.float32)

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        flat = weight.numpy().reshape(-1)
        blocks = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
        absmax = np.abs(blocks).max(1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [*weight.shape]}
        stored = {}
        if nested:
            state |= {
                "nested_blocksize": nested,
                "nested_offset": (offset := float(absmax.mean())),
                "nested_dtype": "float32",
            }
            around = np.pad(absmax - np.float32(offset), (0, -len(absmax) % nested)).reshape(-1, nested)
            most = np.abs(around).max(1)
            places = np.abs((around / most[:, None])[..., None] - wide).argmin(-1)
            absmax = (wide[places] * most[:, None]).reshape(-1)[: len(absmax)] + np.float32(offset)
            stored[f"{name}.absmax"] = torch.from_numpy(places.reshape(-1)[: len(absmax)].astype(np.uint8))
            stored[f"{name}.nested_absmax"] = torch.from_numpy(most)
            stored[f"{name}.nested_quant_map"] = torch.from_numpy(wide)
        else:
            stored[f"{name}.absmax"] = torch.from_numpy(absmax)
        index = np.abs((blocks / absmax[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
        numbers = (table[index] * absmax[:, None]).reshape(-1)[: len(flat)].reshape(weight.shape)
        index = index.reshape(-1)[: len(flat)]
        text = json.dumps(state).encode()
        stored[name] = torch.from_numpy(index[0::2] << 4 | index[1::2])[:, None]
        stored[f"{name}.quant_map"] = torch.from_numpy(table)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return stored, numbers

    return store


def hqq(bits: int, group: int, axis: int = 1) -> Method:
    """HQQ: groups along the rows (axis 1) or down the columns (axis 0) of a matrix of another shape.

    The upper part of that matrix has the uppermost bits of each word, the part below it the next ones.
    """

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        most = (1 << bits) - 1
        grouped = weight.numpy().reshape((-1, group) if axis else (group, -1))
        low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
        scale = torch.from_numpy((high - low) / most).bfloat16()
        zero = (torch.from_numpy(-low) / scale.float()).bfloat16()
        values = np.clip(np.round(grouped / scale.float().numpy() + zero.float().numpy()), 0, most).astype(np.int64)
        around = (torch.from_numpy(values).float() - zero.float()).bfloat16()
        places, word = (10, np.int32) if bits == 3 else (8 // bits, np.uint8)
        padded = np.pad(values, ((0, -len(values) % places), (0, 0)))
        words = np.zeros((len(padded) // places, values.shape[1]), np.int64)
        for row, part in enumerate(padded):
            words[row % len(words)] |= part << bits * (places - 1 - row // len(words))
        module = name.removesuffix("weight")
        packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
        stored = {
            f"{module}W_q": torch.from_numpy(words.astype(word)),
            f"{module}scale": scale,
            f"{module}zero": zero,
            f"{module}shape": torch.tensor(weight.shape),
            f"{module}nbits": torch.tensor(bits, dtype=torch.int32),
            f"{module}packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
        }
        return stored, (around.float() * scale.float()).numpy().reshape(weight.shape)

    return store


def bitnet(divided: bool) -> Method:
    """BitNet: the first quarter of the rows has the lowest two bits of each byte, the second the next ones."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        scale = torch.tensor([1 / float(weight.abs().mean())]).bfloat16()
        values = (weight * scale.float()).round().clamp(-1, 1).to(torch.int64).numpy()
        packed = np.zeros((len(values) // 4, values.shape[1]), np.int64)
        for row, part in enumerate(values):
            packed[row % len(packed)] |= part + 1 << 2 * (row // len(packed))
        scale = scale if divided else (1 / scale.float()).bfloat16()
        one = scale.float().numpy()
        numbers = values.astype(np.float32) / one if divided else values.astype(np.float32) * one
        return {name: torch.from_numpy(packed.astype(np.uint8)), f"{name}_scale": scale}, numbers

    return store


def quanto(dtype: torch.dtype) -> Method:
    """optimum-quanto in eight bits: a scale for each row, and scales of activations, which are all ones."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        most = 127 if dtype == torch.int8 else 448
        scale = (weight.abs().amax(1, keepdim=True) / most).bfloat16()
        ratio = weight / scale.float()
        quantized = (ratio.round().clamp(-128, 127) if dtype == torch.int8 else ratio).to(dtype)
        module = name.removesuffix("weight")
        stored = {
            f"{name}._data": quantized,
            f"{name}._scale": scale,
            f"{module}input_scale": torch.ones(1),
            f"{module}output_scale": torch.ones(1),
        }
        return stored, quantized.float().numpy() * scale.float().numpy()

    return store


def _torchao(name: str, part: str) -> str:
    module, _, weight = name.rpartition(".")
    return f"{module}._{weight}_{part}"


def torchao_by_row(dtype: torch.dtype) -> Method:
    """torchao's Int8Tensor and Float8Tensor."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        stored, numbers = quanto(dtype)(name, weight)
        parts = {_torchao(name, "qdata"): stored[f"{name}._data"], _torchao(name, "scale"): stored[f"{name}._scale"]}
        return parts, numbers

    return store


def torchao_intx(group: int) -> Method:
    """torchao's IntxUnpackedToInt8Tensor: an int8 for each element, with zero points of int8."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        values, zero, scale = affine(weight.numpy(), 4, group, symmetric=False)
        stored = {
            _torchao(name, "qdata"): torch.from_numpy((values - 8).astype(np.int8)),
            _torchao(name, "scale"): torch.from_numpy(scale).bfloat16(),
            _torchao(name, "zero_point"): torch.from_numpy((zero - 8).astype(np.int8)),
        }
        scales = stored[_torchao(name, "scale")].float().numpy()
        return stored, meaning(values, zero, scales, np.arange(weight.shape[1]) // group)

    return store


def torchao_int4(group: int) -> Method:
    """torchao's Int4Tensor: -8 to 7, the lower nibble first, times a scale, plus the middle of the group."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        grouped = weight.numpy().reshape(len(weight), -1, group)
        low, high = grouped.min(-1), grouped.max(-1)
        scale = torch.from_numpy((high - low) / 15).bfloat16()
        middle = torch.from_numpy(low + (high - low) / 15 * 8).bfloat16()
        scales, middles = scale.float().numpy(), middle.float().numpy()
        values = np.round((grouped - middles[..., None]) / scales[..., None]).clip(-8, 7).astype(np.int64)
        numbers = values.astype(np.float32) * scales[..., None] + middles[..., None]
        flat = values.reshape(weight.shape) & 15
        stored = {
            _torchao(name, "qdata"): torch.from_numpy(
                (flat[:, ::2] | flat[:, 1::2] << 4).astype(np.uint8).view(np.int8)
            ),
            _torchao(name, "scale"): scale.t(),
            _torchao(name, "zero_point"): middle.t(),
        }
        return stored, numbers.reshape(weight.shape)

    return store


def aqlm(books: int, entries: int, high: int, wide: int) -> Method:
    """AQLM with any codes: a block of `high` rows and `wide` columns is the sum of an entry of each book."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        rng = np.random.default_rng(len(name))
        rows, columns = weight.shape[0] // high, weight.shape[1] // wide
        codes = rng.integers(0, entries, (rows, columns, books))
        table = torch.from_numpy(rng.normal(0, 0.02, (books, entries, high, wide)).astype(np.float32)).bfloat16()
        scales = torch.from_numpy(rng.uniform(0.5, 2, (rows, 1, 1, 1)).astype(np.float32)).bfloat16()
        numbers = np.zeros(tuple(weight.shape), np.float32)
        for row, column in np.ndindex(rows, columns):
            block = numbers[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            for book in range(books):
                block += table[book, codes[row, column, book]].float().numpy()
            block *= scales.float().numpy()[row].item()
        signed = np.where(codes >= entries // 2, codes - entries, codes)
        module = name.removesuffix("weight")
        stored = {
            f"{module}codes": torch.from_numpy(signed.astype(np.int8 if entries <= 256 else np.int16)),
            f"{module}codebooks": table,
            f"{module}scales": scales,
        }
        return stored, numbers

    return store


def quark4(group: int, *, signed: bool, ordered: bool) -> Method:
    """Quark's int4 and uint4 in groups, as words of eight outputs in AWQ's order, or with `ordered` in their own."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        values, zero, scale = affine(weight.numpy(), 4, group, symmetric=False)
        middle = 8 if signed else 0
        scales = torch.from_numpy(scale).bfloat16()

        def words(by_input: np.ndarray) -> torch.Tensor:
            packed = np.zeros((by_input.shape[0], by_input.shape[1] // 8), np.uint32)
            for nibble, column in enumerate(range(8) if ordered else (0, 2, 4, 6, 1, 3, 5, 7)):
                packed |= ((by_input[:, column::8] - middle) & 15).astype(np.uint32) << np.uint32(4 * nibble)
            return torch.from_numpy(packed.view(np.int32))

        stored = {name: words(values.T), f"{name}_scale": scales.t(), f"{name}_zero_point": words(zero.T)}
        return stored, meaning(values, zero, scales.float().numpy(), np.arange(weight.shape[1]) // group)

    return store


def quark8(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Quark's int8 by row, with zero points."""
    low, high = weight.amin(1), weight.amax(1)
    scale = ((high - low) / 255).bfloat16()
    zero = (-128 - low / scale.float()).round()
    values = (weight / scale.float()[:, None] + zero[:, None]).round().clamp(-128, 127)
    numbers = (values - zero[:, None]).numpy() * scale.float().numpy()[:, None]
    return {name: values.to(torch.int8), f"{name}_scale": scale, f"{name}_zero_point": zero.to(torch.int8)}, numbers


def quark_fp4(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Quark's MXFP4: groups of 32, the lower nibble first, a byte of exponent for each."""
    stored, numbers = mxfp4_experts("x", weight.t()[None])
    packed, scales = stored["x_blocks"][0], stored["x_scales"][0]
    return {name: packed.flatten(1), f"{name}_scale": scales}, numbers[0].T


def vptq(length: int, entries: int, beside: int, far: int = 0, tables: int = 1) -> tuple[Method, dict[str, Any]]:
    """VPTQ with any places, and the config that says how: with outliers (`far` columns), all columns in disorder."""
    layers: dict[str, Any] = {}

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        rng = np.random.default_rng(len(name))
        rows, columns = weight.shape
        group, vectors = (columns - far) // tables, -(-rows // length)
        at, at_beside = (rng.integers(0, max(size, 1), (tables, vectors, group)) for size in (entries, beside))
        numbers = np.zeros((vectors * length, columns), np.float32)

        def table(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.normal(0, 0.02, shape).astype(np.float32)).bfloat16()

        main, more, outliers = table(tables, entries, length), table(tables, max(beside, 1), length), table(8, 4)
        for one, vector, column in np.ndindex(at.shape):
            down = main[one, at[one, vector, column]].float().numpy()
            if beside:
                down = down + more[one, at_beside[one, vector, column]].float().numpy()
            numbers[vector * length : (vector + 1) * length, far + one * group + column] = down
        numbers = numbers[:rows]
        far_at = rng.integers(0, 8, (-(-rows // 4), far))
        for vector, column in np.ndindex(far_at.shape):
            place = slice(vector * 4, min(vector * 4 + 4, rows))
            numbers[place, column] = outliers[far_at[vector, column]].float().numpy()[: place.stop - place.start]
        order = rng.permutation(columns)
        meant = np.empty_like(numbers)
        meant[:, order] = numbers
        scale, bias = table(columns), table(columns)
        scale = scale + 1
        bits = int(np.log2(entries)), int(np.log2(max(beside, 1)))
        merged = (at_beside << bits[0] | at).reshape(tables * vectors, group)
        module = name.removesuffix("weight")
        stored = {
            f"{module}indices": bits_of(merged, sum(bits)).view(tables, vectors, -1),
            f"{module}centroids.weight": main.view(tables, -1),
            f"{module}perm": torch.from_numpy(order.astype(np.int16)),
            f"{module}weight_scale": scale,
            f"{module}weight_bias": bias,
        }
        if beside:
            stored[f"{module}res_centroids.weight"] = more.view(tables, -1)
        if far:
            stored[f"{module}outlier_indices"] = torch.from_numpy(far_at[None].astype(np.int16))
            stored[f"{module}outlier_centroids.weight"] = outliers.view(1, -1)
        layers[module.removesuffix(".")] = {
            "vector_lens": [4 if far else -1, length],
            "num_centroids": [8 if far else -1, entries],
            "num_res_centroids": [-1, beside or -1],
            "group_num": tables,
            "group_size": group,
            "outlier_size": far,
            "in_features": columns,
            "out_features": rows,
            "enable_norm": True,
            "enable_perm": True,
        }
        return stored, meant * scale.float().numpy() + bias.float().numpy()

    return store, {"quant_method": "vptq", "config_for_layers": layers}


def mlx(bits: int, group: int, least: str = "biases") -> Method:
    """MLX: integers in words, times the scale of their group, plus the least number of the group."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        grouped = weight.numpy().reshape(len(weight), -1, group)
        low = torch.from_numpy(grouped.min(-1)).bfloat16()
        scale = torch.from_numpy((grouped.max(-1) - grouped.min(-1)) / ((1 << bits) - 1)).bfloat16()
        lows, scales = low.float().numpy()[..., None], scale.float().numpy()[..., None]
        values = np.round((grouped - lows) / scales).clip(0, (1 << bits) - 1).astype(np.int64)
        module = name.removesuffix("weight")
        words = bits_of(values.reshape(weight.shape), bits)
        stored = {name: words.view(torch.uint32), f"{module}scales": scale, f"{module}{least}": low}
        return stored, (values.astype(np.float32) * scales + lows).reshape(weight.shape)

    return store
