"""Readers of weights that are stored in words, several elements to a word: as integers, or as places in tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint import TensorEntry
from lamina.codec.quantized_layouts import AWQ_ORDER, Codebooks, Gptq, Hqq, Mlx, Ternary, Vectors
from lamina.errors import CheckpointError, UnsupportedError
from lamina.hf.building.quantized_parts import (
    Folder,
    Found,
    bytes_of,
    count_of,
    ending_in,
    integers_in,
    len_of,
    nibbles_weight,
    part_of,
    scaled_weight,
    unfit,
)

_HQQ_STATE = (  # what HQQ stores beside the words, scales and zero points of a weight
    "nbits group_size shape axis packing unpack_view_dtype view_as_float quant_scale quant_zero compute_dtype "
    "offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero"
).split()


_HQQ_BITS = {b"8bit_u8": 8, b"4bit_u8": 4, b"3bit_32": 3, b"2bit_u8": 2, b"1bit_u8": 1}


def read_gptq(folder: Folder) -> Iterator[Found]:
    """GPTQ in 2, 3, 4 or 8 bits, in both of its formats."""
    config = folder.config
    layout = str(config.get("checkpoint_format") or ("marlin" if config.get("is_marlin_format") else "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"{folder.checkpoint.root} is GPTQ in the layout {layout!r}: use one in 'gptq'")
    for module, words in ending_in(folder, ".qweight"):
        zeros, scales = (part_of(folder, f"{module}.{part}", words) for part in ("qzeros", "scales"))
        order = folder.entries.get(f"{module}.g_idx")
        columns = order.shape[0] if order is not None else words.shape[0] * 32 // int(config["bits"])
        bits = words.shape[0] * 32 // max(columns, 1)  # a config may say otherwise for some modules
        rows = words.shape[1]
        shapes = scales.shape[1:], zeros.shape
        if bits not in (2, 3, 4, 8) or shapes != ((rows,), (len_of(scales), rows * bits // 32)):
            raise unfit(words, scales)
        group = -(-columns // len_of(scales))
        packed = Gptq((rows, columns), folder.dtype, bits, group, 1 if layout == "gptq" else 0)
        sources = (words.name, zeros.name, scales.name)
        yield Found(f"{module}.weight", packed, sources if order is None else (*sources, order.name))


def read_awq(folder: Folder) -> Iterator[Found]:
    """AWQ's gemm layout: four bits in an order of their own, with zero points."""
    config = folder.config
    layout = str(config.get("version") or "gemm").lower()
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    if layout not in ("gemm", "exllama", "ipex") or bits != 4:
        raise UnsupportedError(
            f"{folder.checkpoint.root} is AWQ in the layout {layout!r} with {bits} bits: use one in 'gemm' with 4"
        )
    for module, words in ending_in(folder, ".qweight"):
        zeros, scales = (part_of(folder, f"{module}.{part}", words) for part in ("qzeros", "scales"))
        yield nibbles_weight(folder, module, words, zeros, scales, AWQ_ORDER, False)


def read_hqq(folder: Folder) -> Iterator[Found]:
    """Integers by the groups of a matrix that was laid out anew, whose own shape is a tensor beside it."""
    for module, words in ending_in(folder, ".W_q"):
        scale, zero, described = (part_of(folder, f"{module}.{part}", words) for part in ("scale", "zero", "shape"))
        shape = integers_in(folder, described)
        elements, groups = math.prod(shape), count_of(scale)
        if len(shape) != 2 or min(shape) < 1:
            raise unfit(words, described)
        if scale.shape != zero.shape or not groups or elements % groups:
            raise unfit(words, scale)
        bits = _hqq_bits(folder, part_of(folder, f"{module}.packing", words))
        across = scale.shape[:1] == (1,) and groups > 1
        if words.extent.length != _hqq_bytes(bits, elements, groups if across else elements // groups):
            raise unfit(words, scale)
        beside = tuple(f"{module}.{part}" for part in _HQQ_STATE)
        packed = Hqq(shape, folder.dtype, bits, True, groups, across)
        yield Found(f"{module}.weight", packed, (words.name, scale.name, zero.name), beside)


def _hqq_bytes(bits: int, elements: int, wide: int) -> int:
    """Bytes of the words of a matrix whose rows are so wide: of 3 bits, ten rows to one of int32."""
    return -(-elements // wide // 10) * wide * 4 if bits == 3 else elements * bits // 8


def _hqq_bits(folder: Folder, packing: TensorEntry) -> int:
    said = bytes_of(folder, packing)
    if said not in _HQQ_BITS:
        raise CheckpointError(
            f"{packing.name} in {packing.extent.file} says {said[:20].decode('latin-1')!r}, "
            "which is no packing of HQQ: fetch it again"
        )
    return _HQQ_BITS[said]


def read_bitnet(folder: Folder) -> Iterator[Found]:
    """Three numbers, four to a byte; AutoBitLinear multiplies with the scale that BitLinear divides by."""
    multiplied = folder.config.get("linear_class") == "autobitlinear"
    _refuse_bitnet(folder, multiplied)
    for module, weight in ending_in(folder, ".weight"):
        if weight.dtype in ("U8", "I8"):
            scale = part_of(folder, f"{module}.weight_scale", weight)
            if count_of(scale) != 1 or len(weight.shape) != 2:
                raise unfit(weight, scale)
            packed = Ternary((weight.shape[0] * 4, weight.shape[1]), folder.dtype, 2, False, not multiplied)
            yield Found(weight.name, packed, (weight.name, scale.name))
        elif multiplied and f"{module}.weight_scale" in folder.entries:  # the same numbers, not packed
            yield scaled_weight(folder, weight, folder.entries[f"{module}.weight_scale"], None)


def _refuse_bitnet(folder: Folder, multiplied: bool) -> None:
    config = folder.config
    online = multiplied and config.get("quantization_mode") == "online"
    if online or config.get("use_rms_norm"):
        what = "weights that are quantised at each use" if online else "a norm in each matrix"
        raise UnsupportedError(
            f"{folder.checkpoint.root} is BitNet with {what}, which is not known here: use another checkpoint"
        )


def read_mlx(folder: Folder) -> Iterator[Found]:
    """MLX, and transformers' own writing of it (metal), which gives what is added another name."""
    for module, scale in ending_in(folder, ".scales"):
        words = part_of(folder, f"{module}.weight", scale)
        name = next((n for n in (f"{module}.qbiases", f"{module}.biases") if n in folder.entries), f"{module}.biases")
        bits, group = _mlx_scheme(folder, module)
        least = part_of(folder, name, scale)
        columns = group * scale.shape[-1] if scale.shape else 0
        if bits not in range(1, 9) or words.dtype not in ("U32", "I32") or words.shape[-1] * 32 != columns * bits:
            raise unfit(words, scale)
        if scale.shape != least.shape or scale.shape[:-1] != words.shape[:-1]:
            raise unfit(words, least)
        packed = Mlx((*words.shape[:-1], columns), folder.dtype, bits, group)
        yield Found(words.name, packed, (words.name, scale.name, least.name))


def _mlx_scheme(folder: Folder, module: str) -> tuple[int, int]:
    """Bits, and columns of a group, which a config may say of some modules otherwise."""
    of_module = folder.config.get(module)
    said = {**folder.config, **(of_module if isinstance(of_module, dict) else {})}
    if said.get("mode", "affine") != "affine":
        raise UnsupportedError(
            f"{folder.checkpoint.root} is quantised in MLX's mode {said['mode']!r}, which is not known here: "
            "use one in 'affine'"
        )
    return int(said.get("bits") or 0), int(said.get("group_size") or 0)


def read_aqlm(folder: Folder) -> Iterator[Found]:
    """Codes of small blocks, the same codebooks for all of a matrix."""
    for module, codes in ending_in(folder, ".codes"):
        books, scales = (part_of(folder, f"{module}.{part}", codes) for part in ("codebooks", "scales"))
        if len(codes.shape) != 3 or len(books.shape) != 4 or codes.shape[2:] != books.shape[:1]:
            raise unfit(codes, books)
        if count_of(scales) != codes.shape[0] or 0 in books.shape:
            raise unfit(codes, scales)
        shape = (codes.shape[0] * books.shape[2], codes.shape[1] * books.shape[3])
        packed = Codebooks(shape, folder.dtype)
        yield Found(f"{module}.weight", packed, (codes.name, books.name, scales.name))


@dataclass(frozen=True)
class VectorScheme:
    """What a config says of a weight that VPTQ quantised; of pairs, what is said of the outliers comes first."""

    lengths: tuple[int, int]
    entries: tuple[int, int]
    entries_beside: int
    tables: int
    group: int
    outliers: int
    rows: int
    permuted: bool
    normed: bool

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> VectorScheme:
        """Raises KeyError, TypeError or ValueError for what is no such thing."""
        far_length, length = (int(size) for size in said["vector_lens"])
        far_entries, entries = (int(size) for size in said["num_centroids"])
        beside, tables, group = int(said["num_res_centroids"][1]), int(said["group_num"]), int(said["group_size"])
        if min(length, entries, tables, group) < 1:
            raise ValueError("sizes below 1")
        outliers = int(said.get("outlier_size") or 0) if far_length > 1 and far_entries > 0 else 0
        flags = bool(said.get("enable_perm", True)), bool(said.get("enable_norm", True))
        rows = int(said.get("out_features") or 0)
        return cls((far_length, length), (far_entries, entries), beside, tables, group, outliers, rows, *flags)

    @property
    def bits(self) -> tuple[int, int]:
        """Of a place in the tables, and in those of what is added."""
        return (self.entries[1] - 1).bit_length(), max(self.entries_beside - 1, 0).bit_length()

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of each tensor that is stored, by its name behind the module's."""
        (far_length, length), columns = self.lengths, self.tables * self.group + self.outliers
        shapes: dict[str, tuple[int, ...]] = {
            "indices": (self.tables, -(-rows // length), -(-self.group * sum(self.bits) // 32)),
            "centroids.weight": (self.tables, length * self.entries[1]),
        }
        if self.entries_beside > 0:
            shapes["res_centroids.weight"] = (self.tables, length * self.entries_beside)
        if self.outliers:
            shapes["outlier_indices"] = (1, -(-rows // far_length), self.outliers)
            shapes["outlier_centroids.weight"] = (1, far_length * self.entries[0])
        if self.permuted:
            shapes["perm"] = (columns,)
        if self.normed:
            shapes |= {"weight_scale": (columns,), "weight_bias": (columns,)}
        return shapes


def read_vptq(folder: Folder) -> Iterator[Found]:
    """Tables of vectors; how long these are, and how many there are, is in the config alone."""
    layers = folder.config.get("config_for_layers") or {}
    for module, words in ending_in(folder, ".indices"):
        try:
            scheme = VectorScheme.of(layers[module])
        except (KeyError, TypeError, ValueError):
            root = folder.checkpoint.root
            raise CheckpointError(f"the config of {root} does not say how {module} is quantised") from None
        rows = scheme.rows or words.shape[-2] * scheme.lengths[1]
        stored = {part: part_of(folder, f"{module}.{part}", words) for part in scheme.shapes(rows)}
        for part, shape in scheme.shapes(rows).items():
            if stored[part].shape != shape:
                raise unfit(words, stored[part])
        shape = (rows, scheme.tables * scheme.group + scheme.outliers)
        parts = tuple(part.removesuffix(".weight") for part in stored)
        far_length, length = scheme.lengths
        packed = Vectors(shape, folder.dtype, parts, length, far_length, scheme.group, *scheme.bits)
        yield Found(f"{module}.weight", packed, tuple(entry.name for entry in stored.values()))
