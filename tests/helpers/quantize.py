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


def hqq(bits: int, group: int, axis: int) -> Method:
    """HQQ's groups are rows (axis 1) or columns (axis 0) of a matrix that was laid out anew; bf16 throughout."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        flat = weight.numpy().reshape(-1)
        laid = flat.reshape(-1, group) if axis == 1 else flat.reshape(group, -1)
        low, high = laid.min(axis, keepdims=True), laid.max(axis, keepdims=True)
        most = 2**bits - 1
        scale = torch.from_numpy(np.maximum(high - low, 1e-6) / most).bfloat16()
        zero = torch.from_numpy(-low / scale.float().numpy()).bfloat16()
        values = np.clip(np.round(laid / scale.float().numpy() + zero.float().numpy()), 0, most).astype(np.uint32)
        meant = ((torch.from_numpy(values.astype(np.float32)).bfloat16() - zero) * scale).float().numpy()
        module = name.removesuffix("weight")
        stored = {
            f"{module}W_q": _planes(values, bits),
            f"{module}scale": scale,
            f"{module}zero": zero,
            f"{module}shape": torch.tensor(weight.shape),
            f"{module}nbits": torch.tensor(bits, dtype=torch.int32),
            f"{module}axis": torch.tensor(axis, dtype=torch.int32),
            f"{module}packing": torch.tensor([0, 1], dtype=torch.uint8),
        }
        return stored, meant.reshape(weight.shape)

    return store


def _planes(values: np.ndarray, bits: int) -> torch.Tensor:
    """The rows in as many parts as a word has places, the first in the uppermost place; of 3 bits ten to an int32."""
    places = 10 if bits == 3 else 8 // bits
    rows = -(-len(values) // places)
    padded = np.zeros((rows * places, values.shape[1]), np.uint32)
    padded[: len(values)] = values
    words = np.zeros((rows, values.shape[1]), np.uint32)
    for place in range(places):
        words |= padded[place * rows : (place + 1) * rows] << np.uint32(bits * (places - 1 - place))
    return torch.from_numpy(words.astype(np.int32) if bits == 3 else words.astype(np.uint8))


def torchao(kind: str, group: int = 32) -> Method:
    """torchao's weight-only tensors, laid out flat: int8 and float8 by row, int4 in groups."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        module, _, parameter = name.rpartition(".")
        prefix = f"{module}._{parameter}_"
        if kind == "int4":
            blocks = weight.numpy().reshape(len(weight), -1, group)
            low, high = blocks.min(2), blocks.max(2)
            scale = torch.from_numpy((high - low) / 15).bfloat16().float().numpy()
            middle = torch.from_numpy(low + 8 * scale).bfloat16().float().numpy()
            values = np.clip(np.round((blocks - middle[..., None]) / scale[..., None]), -8, 7)
            meant = (values * scale[..., None] + middle[..., None]).reshape(weight.shape)
            nibbles = values.astype(np.int8).reshape(weight.shape) & 15
            return {
                f"{prefix}qdata": torch.from_numpy((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.int8)),
                f"{prefix}scale": torch.from_numpy(scale.T.copy()).bfloat16(),
                f"{prefix}zero_point": torch.from_numpy(middle.T.copy()).bfloat16(),
            }, meant
        most = 127.0 if kind == "int8" else 448.0
        scale = weight.abs().amax(1, keepdim=True) / most
        divided = weight / scale
        quantized = divided.round().to(torch.int8) if kind == "int8" else divided.to(torch.float8_e4m3fn)
        stored = {f"{prefix}qdata": quantized, f"{prefix}scale": scale}
        if kind == "int8":
            stored[f"{prefix}zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        return stored, (quantized.float() * scale).numpy()

    return store


def bitnet(auto: bool) -> Method:
    """-1, 0 and 1, four rows of quarters to a byte, the first in the lowest place; one scale."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        mean = weight.abs().mean()
        values = torch.clamp((weight / mean).round(), -1, 1).numpy()
        rows = len(values) // 4
        packed = sum((values[part * rows : (part + 1) * rows] + 1).astype(np.uint8) << 2 * part for part in range(4))
        scale = (mean if auto else 1 / mean).view(1).bfloat16()
        number = scale.float().numpy()
        meant = values * number if auto else values / number
        return {name: torch.from_numpy(packed), f"{name}_scale": scale}, meant

    return store


def quanto(dtype: torch.dtype) -> Method:
    """Eight bits by row, with the places for scales of activations that optimum-quanto writes too."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        scale = (weight.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)).bfloat16()
        divided = weight / scale.float()
        quantized = divided.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else divided.to(dtype)
        module = name.removesuffix("weight")
        ones = {f"{module}{part}_scale": torch.ones(()) for part in ("input", "output")}
        stored = {f"{name}._data": quantized, f"{name}._scale": scale, **ones}
        return stored, (quantized.float() * scale.float()).numpy()

    return store


def aqlm(books: int, bits: int, block: tuple[int, int]) -> Method:
    """Sums of entries of codebooks; codes and books at random, for nothing is learned of what the method means."""

    def store(name: str, weight: torch.Tensor) -> tuple[Stored, np.ndarray]:
        random = np.random.default_rng(weight.numel())
        high, wide = block
        groups = weight.shape[0] // high, weight.shape[1] // wide
        codes = random.integers(0, 2**bits, (*groups, books))
        tables = torch.from_numpy(random.normal(0, 0.05, (books, 2**bits, high, wide))).bfloat16()
        scales = torch.from_numpy(random.uniform(0.5, 2, (groups[0], 1, 1, 1))).bfloat16()
        meant = np.zeros(weight.shape, np.float32)
        for row, column in np.ndindex(*groups):
            total = np.zeros(block, np.float32)
            for book in range(books):
                total += tables[book, codes[row, column, book]].float().numpy()
            at = np.s_[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            meant[at] = total * scales[row].float().item()
        module = name.removesuffix("weight")
        signed = codes.astype(np.int16 if bits > 8 else np.int8)
        stored = {f"{module}codes": torch.from_numpy(signed), f"{module}codebooks": tables, f"{module}scales": scales}
        return stored, meant

    return store
