"""Checkpoints that were quantised before they were published, streamed as they are stored.

transformers loads these with a package for each method, most of which want a GPU, and several write in place, which
cannot be recorded. What the stored tensors mean is well defined however, so it is said here: the tensors that make
up one weight become one `DiskTensor` whose expression is their unpacking (`lamina.codec.quantized_layouts`).
transformers then builds an ordinary model from it, renames, merges and all; the bytes that stream are the packed ones.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lamina.checkpoint import Checkpoint, TensorEntry
from lamina.codec.quantized_layouts import (
    AWQ_ORDER,
    Awq,
    Codebooks,
    Float4,
    Float4Experts,
    Gptq,
    Hqq,
    Integers,
    Lookup4,
    Mlx,
    Packed,
    Scaled,
    Signed4,
    Ternary,
    Vectors,
)
from lamina.errors import CheckpointError, RequestError, UnsupportedError
from lamina.hf.internals import Conv1D
from lamina.tensors.disk import DiskTensor
from lamina.tensors.expressions import Computed

Entries = Mapping[str, TensorEntry]
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
NOT_READ_ALONE = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of a config
MOST_STATE_BYTES = 1 << 16  # of the JSON beside a weight of bitsandbytes
_BNB_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_TORCHAO = re.compile(r"(.+)\._([^.]+)_qdata")
_QUANTO = "._scale"  # how the names of its scales end
_HQQ_STATE = (  # what HQQ stores beside the words, scales and zero points of a weight
    "nbits group_size shape axis packing unpack_view_dtype view_as_float quant_scale quant_zero compute_dtype "
    "offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero"
).split()
_HQQ_BITS = {b"8bit_u8": 8, b"4bit_u8": 4, b"3bit_32": 3, b"2bit_u8": 2, b"1bit_u8": 1}
_BYTES_OF_INTEGERS = {"I64": 8, "I32": 4}


@dataclass(frozen=True)
class Found:
    """A weight of which the checkpoint holds the parts.

    Attributes:
        sources: the tensors that it is unpacked from.
        beside: tensors that only describe it.
    """

    name: str
    packed: Packed
    sources: tuple[str, ...]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """What a method's reader may look at."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def entries(self) -> Entries:
        """The checkpoint's tensors, by name."""
        return self.checkpoint.tensors


Reader = Callable[[Folder], Iterator[Found]]


def take_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the checkpoint is quantised, taken out of its config, from which an ordinary model is then built.

    Raises:
        UnsupportedError: a method that is not known here.
        RequestError: quantising on the way is asked for.
    """
    found: Any = None
    for part in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            value = part.__dict__.pop(key, None)
            found = found or value
    if not found:
        return None
    if isinstance(found, str | int | float | list):
        raise CheckpointError(f"quantization_config must be an object, got {str(found)[:60]!r}: fetch the config again")
    if not isinstance(found, dict):
        raise RequestError("quantization_config is not taken: `lamina split --compression` writes smaller weights")
    method = _method(found)
    if method not in _READERS:
        raise UnsupportedError(
            f"weights quantised with {method!r} cannot be unpacked here (known: {', '.join(_READERS)}): "
            "use another checkpoint of this model"
        )
    return {**found, "quant_method": method}


def implied_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a config does not say of a checkpoint that optimum-quanto wrote, whose map of modules lies beside it."""
    if any(name.endswith(f".weight{_QUANTO}") for name in checkpoint.tensors):
        return {"quant_method": "quanto"}
    return None


def unpacked_state(
    state: Mapping[str, DiskTensor],
    checkpoint: Checkpoint,
    quantization: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> dict[str, DiskTensor]:
    """The tensors of a checkpoint, with each weight that it holds in parts in place of these parts.

    Args:
        state: every tensor of the checkpoint.
        quantization: as `take_quantization` gave it.
        dtype: what weights are unpacked to; None for that of the other tensors.

    Raises:
        CheckpointError: parts that do not fit one another, or none at all.
        UnsupportedError: a layout within the method that is not known here.
    """
    dtype = dtype or next((FLOATS[e.dtype] for e in checkpoint.tensors.values() if e.dtype in FLOATS), torch.bfloat16)
    weights: dict[str, DiskTensor] = {}
    parts: set[str] = set()
    for found in _READERS[quantization["quant_method"]](Folder(checkpoint, quantization, dtype)):
        weights[found.name] = DiskTensor.computed(found.packed, found.sources, found.packed.shape, dtype)
        parts.update(found.sources, found.beside)
    if not weights:
        raise CheckpointError(
            f"the config of {checkpoint.root} says that it is quantised with {quantization['quant_method']}, "
            "but no tensor is: config and weights are of different models"
        )
    return {**{name: tensor for name, tensor in state.items() if name not in parts}, **weights}


def check_unpacked(model: PreTrainedModel, where: str) -> None:
    """Refuses a model of which some weight would be raw integers, or lie the wrong way round.

    Raises:
        CheckpointError: a weight without its scales.
        UnsupportedError: an unpacked weight in a Conv1D, whose rows and columns are exchanged.
    """
    for name, module in model.named_modules():
        for attribute, tensor in module._parameters.items():
            if not isinstance(tensor, DiskTensor):
                continue
            if tensor.cast_from in NOT_READ_ALONE:
                raise CheckpointError(
                    f"{name}.{attribute} is stored in {where} as {str(tensor.cast_from).removeprefix('torch.')}, "
                    "and no scales are beside it: the checkpoint is incomplete, fetch it again"
                )
            if isinstance(module, Conv1D) and _is_computed(tensor):
                raise UnsupportedError(
                    f"{name} in {where} is a quantised Conv1D, which cannot be unpacked here: "
                    "use another checkpoint of this model"
                )


def _is_computed(tensor: DiskTensor) -> bool:
    return tensor.boxes is None or any(isinstance(box.source, Computed) for box in tensor.boxes)


def _method(config: Mapping[str, Any]) -> str:
    if config.get("load_in_4bit") or config.get("load_in_8bit") or config.get("_load_in_4bit"):
        return "bitsandbytes"
    method = config.get("quant_method")
    if method == "auto-round":
        packing = str(config.get("packing_format", ""))
        method = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing, f"auto-round ({packing})")
    if method is None and "bits" in config and "group_size" in config:
        return "mlx"  # which does not say that it is
    return str(getattr(method, "value", method))


# -- one reader for each method


def _fp8(folder: Folder) -> Iterator[Found]:
    """Block FP8 and what is stored like it: a scale, or a grid of them, by a name of its own beside each weight."""
    block = folder.config.get("weight_block_size")
    for name, scale in folder.entries.items():
        if name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
        elif name.endswith((".scale", ".qscale_weight")):
            weight = f"{name.rpartition('.')[0]}.weight"
        else:
            continue
        entry = folder.entries.get(weight)
        if entry is not None and entry.dtype in FLOAT8:
            yield _scaled(folder, entry, scale, block)
        elif entry is not None and entry.dtype in ("I8", "U8"):
            shape = (*entry.shape[:-1], entry.shape[-1] * 2)
            yield _float4(folder, weight, entry, scale, shape)


def _mxfp4(folder: Folder) -> Iterator[Found]:
    """gpt-oss: the experts of a layer in one tensor, which the model wants with inputs and outputs exchanged."""
    for name, entry in folder.entries.items():
        weight = name.removesuffix("_blocks")
        scale = folder.entries.get(f"{weight}_scales")
        if weight == name or scale is None:
            continue
        if len(entry.shape) != 4 or entry.shape[:-1] != scale.shape:
            raise _unfit(entry, scale)
        experts, rows, groups, packed = entry.shape
        shape = (experts, groups * packed * 2, rows)
        yield Found(weight, Float4Experts(shape, folder.dtype, packed * 2), (name, scale.name))


def _compressed(folder: Folder) -> Iterator[Found]:
    """compressed-tensors, and FP8 by row (fbgemm) or by tensor (modelopt), which name their scales alike."""
    _refuse_sparse(folder)
    for module, scale in _ending_in(folder, ".weight_scale"):
        packed = folder.entries.get(f"{module}.weight_packed")
        entry = folder.entries.get(f"{module}.weight")
        if packed is not None and packed.dtype == "I32":
            yield _integers(folder, module, packed, scale)
        elif packed is not None:
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            yield _float4(folder, f"{module}.weight", packed, scale, shape, f"{module}.weight_global_scale")
        elif entry is not None and entry.dtype in (*FLOAT8, "I8"):
            found = _scaled(folder, entry, scale, (_scheme(folder, module) or {}).get("block_structure"))
            zeros = folder.entries.get(f"{module}.weight_zero_point")
            yield found if zeros is None else replace(found, sources=(*found.sources, zeros.name))


def _refuse_sparse(folder: Folder) -> None:
    formats = {str(folder.config.get("format")), *(str(g.get("format")) for g in _groups(folder))}
    sparse = (folder.config.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or "marlin-24" in formats:
        raise UnsupportedError(
            f"{folder.checkpoint.root} stores sparse weights ({sparse if sparse != 'dense' else 'marlin-24'}), "
            "which cannot be unpacked here: use another checkpoint of this model"
        )


def _gptq(folder: Folder) -> Iterator[Found]:
    config = folder.config
    layout = str(config.get("checkpoint_format") or ("marlin" if config.get("is_marlin_format") else "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"{folder.checkpoint.root} is GPTQ in the layout {layout!r}: use one in 'gptq'")
    for module, words in _ending_in(folder, ".qweight"):
        zeros, scales = (_part(folder, f"{module}.{part}", words) for part in ("qzeros", "scales"))
        order = folder.entries.get(f"{module}.g_idx")
        columns = order.shape[0] if order is not None else words.shape[0] * 32 // int(config["bits"])
        bits = words.shape[0] * 32 // max(columns, 1)  # a config may say otherwise for some modules
        rows = words.shape[1]
        shapes = scales.shape[1:], zeros.shape
        if bits not in (2, 3, 4, 8) or shapes != ((rows,), (len_of(scales), rows * bits // 32)):
            raise _unfit(words, scales)
        group = -(-columns // len_of(scales))
        packed = Gptq((rows, columns), folder.dtype, bits, group, 1 if layout == "gptq" else 0)
        sources = (words.name, zeros.name, scales.name)
        yield Found(f"{module}.weight", packed, sources if order is None else (*sources, order.name))


def _awq(folder: Folder) -> Iterator[Found]:
    config = folder.config
    layout = str(config.get("version") or "gemm").lower()
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    if layout not in ("gemm", "exllama", "ipex") or bits != 4:
        raise UnsupportedError(
            f"{folder.checkpoint.root} is AWQ in the layout {layout!r} with {bits} bits: use one in 'gemm' with 4"
        )
    for module, words in _ending_in(folder, ".qweight"):
        zeros, scales = (_part(folder, f"{module}.{part}", words) for part in ("qzeros", "scales"))
        yield _nibbles(folder, module, words, zeros, scales, AWQ_ORDER, False)


def _bitsandbytes(folder: Folder) -> Iterator[Found]:
    """4 bits with a table and blocks of absmax, or 8 bits with one absmax a row."""
    for name, entry in folder.entries.items():
        if match := _BNB_STATE.fullmatch(name):
            yield _lookup4(folder, match[1], _json_of(folder, entry))
        elif name.endswith(".SCB"):
            weight = _part(folder, f"{name.removesuffix('SCB')}weight", entry)
            found = _scaled(folder, weight, entry, None)
            yield replace(found, packed=replace(found.packed, factor=1 / 127))  # type: ignore[call-arg]


def _hqq(folder: Folder) -> Iterator[Found]:
    """Integers by the groups of a matrix that was laid out anew, whose own shape is a tensor beside it."""
    for module, words in _ending_in(folder, ".W_q"):
        scale, zero, described = (_part(folder, f"{module}.{part}", words) for part in ("scale", "zero", "shape"))
        shape = _integers_in(folder, described)
        elements, groups = math.prod(shape), _count(scale)
        if len(shape) != 2 or min(shape) < 1:
            raise _unfit(words, described)
        if scale.shape != zero.shape or not groups or elements % groups:
            raise _unfit(words, scale)
        bits = _hqq_bits(folder, _part(folder, f"{module}.packing", words))
        across = scale.shape[:1] == (1,) and groups > 1
        if words.extent.length != _hqq_bytes(bits, elements, groups if across else elements // groups):
            raise _unfit(words, scale)
        beside = tuple(f"{module}.{part}" for part in _HQQ_STATE)
        packed = Hqq(shape, folder.dtype, bits, True, groups, across)
        yield Found(f"{module}.weight", packed, (words.name, scale.name, zero.name), beside)


def _hqq_bytes(bits: int, elements: int, wide: int) -> int:
    """Bytes of the words of a matrix whose rows are so wide: of 3 bits, ten rows to one of int32."""
    return -(-elements // wide // 10) * wide * 4 if bits == 3 else elements * bits // 8


def _hqq_bits(folder: Folder, packing: TensorEntry) -> int:
    said = _bytes_of(folder, packing)
    if said not in _HQQ_BITS:
        raise CheckpointError(
            f"{packing.name} in {packing.extent.file} says {said[:20].decode('latin-1')!r}, "
            "which is no packing of HQQ: fetch it again"
        )
    return _HQQ_BITS[said]


def _torchao(folder: Folder) -> Iterator[Found]:
    """Tensor subclasses laid out flat: which class it is follows from the dtypes of its parts."""
    for name, entry in folder.entries.items():
        if not (match := _TORCHAO.fullmatch(name)):
            continue
        module, weight = match.groups()
        _refuse_torchao(folder, f"{module}._{weight}_", entry)
        scale = _part(folder, f"{module}._{weight}_scale", entry)
        zero = folder.entries.get(f"{module}._{weight}_zero_point")
        if zero is not None and zero.shape != scale.shape:
            raise _unfit(entry, zero)
        of_floats = zero is not None and zero.dtype in FLOATS
        found = _signed4(folder, entry, scale) if of_floats else _scaled(folder, entry, scale, None)
        sources = found.sources if zero is None else (*found.sources, zero.name)
        yield replace(found, name=f"{module}.{weight}", sources=sources)


def _refuse_torchao(folder: Folder, prefix: str, entry: TensorEntry) -> None:
    scale = folder.entries.get(f"{prefix}scale")
    tensor = {
        "Int4TilePackedTo4dTensor": f"{prefix}scale_and_zero" in folder.entries,
        "NVFP4Tensor or MXTensor": entry.dtype == "U8" or (scale is not None and scale.dtype not in FLOATS),
        "a tensor with act_pre_scale": f"{prefix}act_pre_scale" in folder.entries,
        f"a tensor of {entry.dtype}": entry.dtype not in (*FLOAT8, "I8", "U8"),
    }
    if kind := next((kind for kind, is_it in tensor.items() if is_it), None):
        raise UnsupportedError(
            f"{entry.name} in {folder.checkpoint.root} is torchao's {kind}, which cannot be unpacked here: "
            "use another checkpoint of this model"
        )


def _signed4(folder: Folder, packed: TensorEntry, scale: TensorEntry) -> Found:
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if len(shape) not in (2, 3) or scale.shape[-1:] != shape[-2:-1] or scale.shape[:-2] != shape[:-2]:
        raise _unfit(packed, scale)
    groups = scale.shape[-2] if len(scale.shape) == len(shape) else 0
    if not groups or shape[-1] % groups:
        raise _unfit(packed, scale)
    return Found("", Signed4(shape, folder.dtype, shape[-1] // groups), (packed.name, scale.name))


def _bitnet(folder: Folder) -> Iterator[Found]:
    """Three numbers, four to a byte; AutoBitLinear multiplies with the scale that BitLinear divides by."""
    config = folder.config
    auto = config.get("linear_class") == "autobitlinear"
    if config.get("use_rms_norm") or (auto and config.get("quantization_mode") == "online"):
        what = "a norm in each matrix" if config.get("use_rms_norm") else "weights that are quantised at each use"
        raise UnsupportedError(
            f"{folder.checkpoint.root} is BitNet with {what}, which is not known here: use another checkpoint"
        )
    for module, scale in _ending_in(folder, ".weight_scale"):
        weight = _part(folder, f"{module}.weight", scale)
        if _count(scale) != 1 or len(weight.shape) != 2:
            raise _unfit(weight, scale)
        if weight.dtype in FLOATS and auto:
            yield _scaled(folder, weight, scale, None)
        elif weight.dtype in ("U8", "I8"):
            packed = Ternary((weight.shape[0] * 4, weight.shape[1]), folder.dtype, 2, False, not auto)
            yield Found(weight.name, packed, (weight.name, scale.name))


def _quanto(folder: Folder) -> Iterator[Found]:
    """Eight bits by row. Of fewer bits the checkpoint does not say which shape they have."""
    for weight, scale in _ending_in(folder, _QUANTO):
        if f"{weight}._data._data" in folder.entries:
            raise UnsupportedError(
                f"{weight} in {folder.checkpoint.root} is quanto's qint4 or qint2, whose shape is stored nowhere: "
                "use a checkpoint in qint8 or qfloat8"
            )
        entry = _part(folder, f"{weight}._data", scale)
        module = weight.rpartition(".")[0]
        beside = tuple(f"{module}.{part}" for part in ("input_scale", "output_scale"))
        yield replace(_scaled(folder, entry, scale, None), name=weight, beside=beside)


def _quark(folder: Folder) -> Iterator[Found]:
    """AMD's Quark: FP8 and int8 by tensor or row, FP4 with exponents, and 4 bits in groups packed as AWQ does it."""
    steps = folder.config.get("algo_config") or ()
    if any(
        step.get("r4") or step.get("online_r1_rotation") for step in ([steps] if isinstance(steps, dict) else steps)
    ):
        raise UnsupportedError(
            f"{folder.checkpoint.root} is Quark with rotations of activations, which are not known here: "
            "use another checkpoint of this model"
        )
    for module, scale in _ending_in(folder, ".weight_scale"):
        weight = _part(folder, f"{module}.weight", scale)
        said = _quark_scheme(folder, module)
        found = _quark_weight(folder, module, weight, scale, said)
        if found is None:
            what = f"{said.get('dtype')} {said.get('qscheme')} as {weight.dtype}"
            raise UnsupportedError(
                f"{weight.name} in {folder.checkpoint.root} is Quark's {what}, which cannot be unpacked here: "
                "use another checkpoint of this model"
            )
        yield found


def _quark_weight(
    folder: Folder, module: str, weight: TensorEntry, scale: TensorEntry, said: Mapping[str, Any]
) -> Found | None:
    """None for what is not known here."""
    by_group, dtype = said.get("qscheme") == "per_group", said.get("dtype")
    if weight.dtype in FLOAT8 or (weight.dtype == "I8" and not by_group):
        return _with_zeros(folder, _scaled(folder, weight, scale, said.get("block_size")), module)
    if weight.dtype == "U8" and dtype == "fp4" and said.get("scale_format") == "e8m0":
        return _float4(folder, weight.name, weight, scale, (*weight.shape[:-1], weight.shape[-1] * 2))
    if weight.dtype == "I32" and by_group and dtype in ("int4", "uint4"):
        return _quark4(folder, module, weight, scale, dtype == "int4")
    return None


def _quark_scheme(folder: Folder, module: str) -> Mapping[str, Any]:
    """How Quark quantised a module's weight: by the first pattern that it fits, else as all of them."""
    of_layers = folder.config.get("layer_quant_config") or {}
    fitting = (said for pattern, said in of_layers.items() if fnmatch.fnmatch(module, pattern))
    weight = (next(fitting, None) or folder.config.get("global_quant_config") or {}).get("weight")
    if not isinstance(weight, dict):
        raise UnsupportedError(
            f"the config of {folder.checkpoint.root} does not say in one step how {module} is quantised: "
            "use another checkpoint of this model"
        )
    return weight


def _with_zeros(folder: Folder, found: Found, module: str) -> Found:
    """Of integers by tensor or row, with their zero points where there are any."""
    zeros = folder.entries.get(f"{module}.weight_zero_point")
    if zeros is None:
        return found
    scale = folder.entries[found.sources[1]]
    if _count(zeros) not in (1, _count(scale)):
        raise _unfit(folder.entries[found.sources[0]], zeros)
    return replace(found, sources=(*found.sources, zeros.name))


def _quark4(folder: Folder, module: str, words: TensorEntry, scale: TensorEntry, signed: bool) -> Found:
    zeros = _part(folder, f"{module}.weight_zero_point", words)
    packing = (folder.config.get("export") or {}).get("pack_method", "reorder")
    order = AWQ_ORDER if packing == "reorder" else tuple(range(8))
    return _nibbles(folder, module, words, zeros, scale, order, signed)


def _nibbles(
    folder: Folder,
    module: str,
    words: TensorEntry,
    zeros: TensorEntry,
    scales: TensorEntry,
    order: tuple[int, ...],
    signed: bool,
) -> Found:
    """Eight outputs in a word: the words of each input, and the zero points and scales of each group of inputs."""
    if len(words.shape) != 2:
        raise _unfit(words, scales)
    columns, rows = words.shape[0], words.shape[1] * 8
    if scales.shape[1:] != (rows,) or zeros.shape != (len_of(scales), words.shape[1]) or columns % len_of(scales):
        raise _unfit(words, scales)
    packed = Awq((rows, columns), folder.dtype, columns // len_of(scales), order, signed)
    return Found(f"{module}.weight", packed, (words.name, zeros.name, scales.name))


def _mlx(folder: Folder) -> Iterator[Found]:
    """MLX, and transformers' own writing of it (metal), which gives what is added another name."""
    for module, scale in _ending_in(folder, ".scales"):
        words = _part(folder, f"{module}.weight", scale)
        name = next((n for n in (f"{module}.qbiases", f"{module}.biases") if n in folder.entries), f"{module}.biases")
        bits, group = _mlx_scheme(folder, module)
        least = _part(folder, name, scale)
        columns = group * scale.shape[-1] if scale.shape else 0
        if bits not in range(1, 9) or words.dtype not in ("U32", "I32") or words.shape[-1] * 32 != columns * bits:
            raise _unfit(words, scale)
        if scale.shape != least.shape or scale.shape[:-1] != words.shape[:-1]:
            raise _unfit(words, least)
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


def _aqlm(folder: Folder) -> Iterator[Found]:
    """Codes of small blocks, the same codebooks for all of a matrix."""
    for module, codes in _ending_in(folder, ".codes"):
        books, scales = (_part(folder, f"{module}.{part}", codes) for part in ("codebooks", "scales"))
        if len(codes.shape) != 3 or len(books.shape) != 4 or codes.shape[2:] != books.shape[:1]:
            raise _unfit(codes, books)
        if _count(scales) != codes.shape[0] or 0 in books.shape:
            raise _unfit(codes, scales)
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


def _vptq(folder: Folder) -> Iterator[Found]:
    """Tables of vectors; how long these are, and how many there are, is in the config alone."""
    layers = folder.config.get("config_for_layers") or {}
    for module, words in _ending_in(folder, ".indices"):
        try:
            scheme = VectorScheme.of(layers[module])
        except (KeyError, TypeError, ValueError):
            root = folder.checkpoint.root
            raise CheckpointError(f"the config of {root} does not say how {module} is quantised") from None
        rows = scheme.rows or words.shape[-2] * scheme.lengths[1]
        stored = {part: _part(folder, f"{module}.{part}", words) for part in scheme.shapes(rows)}
        for part, shape in scheme.shapes(rows).items():
            if stored[part].shape != shape:
                raise _unfit(words, stored[part])
        shape = (rows, scheme.tables * scheme.group + scheme.outliers)
        parts = tuple(part.removesuffix(".weight") for part in stored)
        far_length, length = scheme.lengths
        packed = Vectors(shape, folder.dtype, parts, length, far_length, scheme.group, *scheme.bits)
        yield Found(f"{module}.weight", packed, tuple(entry.name for entry in stored.values()))


# -- what several of them share


def _ending_in(folder: Folder, ending: str) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors whose names end so, each with what stands before."""
    for name, entry in folder.entries.items():
        if name.endswith(ending):
            yield name.removesuffix(ending), entry


def _scaled(folder: Folder, weight: TensorEntry, scale: TensorEntry, block: Any) -> Found:
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (1, *weight.shape)
    if _count(scale) == 1:
        grid = (1, 1)
    elif len(scale.shape) == 1:
        grid = (scale.shape[0], 1)
    else:
        grid = (scale.shape[-2], scale.shape[-1])
    high, wide = block if block and len(block) == 2 else (None, None)
    blocks = _block(rows, grid[0], high), _block(columns, grid[1], wide)
    matrices = 1 if len(weight.shape) < 3 else _count(weight) // (rows * columns)
    if blocks[0] is None or blocks[1] is None or _count(scale) not in (1, matrices * grid[0] * grid[1]):
        raise _unfit(weight, scale)
    packed = Scaled(weight.shape, folder.dtype, grid, (blocks[0], blocks[1]))
    return Found(weight.name, packed, (weight.name, scale.name))


def _block(size: int, parts: int, wanted: int | None) -> int | None:
    """How many rows or columns share a scale, None where it is unknown; the last block may be smaller."""
    if wanted and -(-size // wanted) == parts:
        return wanted
    return size // parts if parts and size % parts == 0 else None


def _float4(
    folder: Folder, name: str, packed: TensorEntry, scale: TensorEntry, shape: tuple[int, ...], divisor: str = ""
) -> Found:
    columns = shape[-1]
    if not scale.shape or scale.shape[:-1] != shape[:-1] or columns % scale.shape[-1]:
        raise _unfit(packed, scale)
    sources: tuple[str, ...] = (packed.name, scale.name)
    if divisor in folder.entries:
        sources = (*sources, divisor)
    return Found(name, Float4(shape, folder.dtype, columns // scale.shape[-1]), sources)


def _integers(folder: Folder, module: str, words: TensorEntry, scale: TensorEntry) -> Found:
    scheme = _scheme(folder, module)
    if scheme is None:
        raise CheckpointError(f"the config of {folder.checkpoint.root} does not say how {module} is quantised")
    bits = int(scheme.get("num_bits", 0))
    group = int(scheme.get("group_size") or -1)
    per_row = scale.shape[-1] if scale.shape else 1
    if bits not in range(1, 9):
        raise _unfit(words, scale)
    columns = per_row * group if group > 0 else words.shape[-1] * 32 // bits
    if len(words.shape) != 2 or words.shape[-1] != -(-columns * bits // 32):
        raise _unfit(words, scale)
    zeros, order = (folder.entries.get(f"{module}.weight_{part}") for part in ("zero_point", "g_idx"))
    packed = Integers((words.shape[0], columns), folder.dtype, bits, group if group > 0 else columns, zeros is not None)
    parts = (words, scale, zeros, order)
    return Found(f"{module}.weight", packed, tuple(part.name for part in parts if part is not None))


def _lookup4(folder: Folder, weight: str, state: Mapping[str, Any]) -> Found:
    entry = _part(folder, weight, None)
    absmax, table = (_part(folder, f"{weight}.{part}", entry) for part in ("absmax", "quant_map"))
    sources: tuple[str, ...] = (weight, absmax.name, table.name)
    try:
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0.0)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the state of {weight} in {entry.extent.file} lacks shape or blocksize") from None
    elements = torch.Size(shape).numel()
    if block < 1 or -(-elements // block) != _count(absmax) or -(-elements // 2) != _count(entry) or len(shape) < 2:
        raise _unfit(entry, absmax)
    if nested:
        parts = (f"{weight}.nested_absmax", f"{weight}.nested_quant_map")
        sources = (*sources, *(_part(folder, part, entry).name for part in parts))
    return Found(weight, Lookup4(shape, folder.dtype, block, nested, offset), sources)


def _bytes_of(folder: Folder, entry: TensorEntry) -> bytes:
    """What a small tensor holds that describes others."""
    extent = entry.extent
    if "://" in extent.file:
        raise UnsupportedError(
            f"shapes of {folder.checkpoint.root} are in its weight files, not in their headers: download it first"
        )
    try:
        with open(extent.file, "rb") as handle:
            handle.seek(extent.offset)
            return handle.read(min(extent.length, MOST_STATE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{entry.name} in {extent.file} cannot be read: {error.strerror}") from error


def _integers_in(folder: Folder, entry: TensorEntry) -> tuple[int, ...]:
    """The integers of a small tensor."""
    size = _BYTES_OF_INTEGERS.get(entry.dtype)
    if size is None:
        raise CheckpointError(f"{entry.name} in {entry.extent.file} is {entry.dtype}, not integers: fetch it again")
    raw = _bytes_of(folder, entry)
    return tuple(int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size))


def _json_of(folder: Folder, entry: TensorEntry) -> Mapping[str, Any]:
    """The JSON that a tensor of bytes holds."""
    extent = entry.extent
    try:
        state = json.loads(_bytes_of(folder, entry))
    except ValueError as error:
        raise CheckpointError(f"{entry.name} in {extent.file} is no JSON: fetch it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{entry.name} in {extent.file} is no JSON object: fetch it again")
    return state


def _groups(folder: Folder) -> list[Mapping[str, Any]]:
    groups = folder.config.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, dict)]


def _scheme(folder: Folder, module: str) -> Mapping[str, Any] | None:
    """How compressed-tensors quantised a module: the group that names it, else the one that names its class."""
    of_class = None
    for group in _groups(folder):
        weights = group.get("weights")
        for target in group.get("targets") or ():
            if (target.startswith("re:") and re.match(target[3:], module)) or target == module:
                return weights
            if "." not in target and not target.startswith("re:"):
                of_class = of_class or weights
    return of_class


def _part(folder: Folder, name: str, companion: TensorEntry | None) -> TensorEntry:
    entry = folder.entries.get(name)
    if entry is None:
        wanted = f" beside {companion.name}" if companion is not None else ""
        raise CheckpointError(
            f"{folder.checkpoint.root} has no tensor {name!r}{wanted}: it is incomplete, fetch it again"
        )
    return entry


def _unfit(weight: TensorEntry, scale: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{scale.name} of shape {scale.shape} does not fit {weight.name} of shape {weight.shape} "
        f"in {os.path.basename(weight.extent.file)}: the checkpoint is damaged, or in a layout that is not known here"
    )


def _count(entry: TensorEntry) -> int:
    return torch.Size(entry.shape).numel()


def len_of(entry: TensorEntry) -> int:
    """Indices of the first dimension of a stored tensor; 1 for a single number."""
    return max(entry.shape[0], 1) if entry.shape else 1


_READERS: Mapping[str, Reader] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "hqq": _hqq,
    "torchao": _torchao,
    "bitnet": _bitnet,
    "quanto": _quanto,
    "aqlm": _aqlm,
    "quark": _quark,
    "vptq": _vptq,
    "metal": _mlx,
    "mlx": _mlx,
}
