"""Readers of weights that are stored as a number for each element, with scales beside them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lamina.checkpoint import TensorEntry
from lamina.codec.quantized_layouts import AWQ_ORDER, Float4Experts, Integers, Lookup4, Signed4
from lamina.errors import CheckpointError, UnsupportedError
from lamina.hf.building.quantized_parts import (
    FLOAT8,
    FLOATS,
    Folder,
    Found,
    count_of,
    ending_in,
    float4_weight,
    json_of,
    nibbles_weight,
    part_of,
    scaled_weight,
    unfit,
)

_BNB_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")


_TORCHAO = re.compile(r"(.+)\._([^.]+)_qdata")


def read_fp8(folder: Folder) -> Iterator[Found]:
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
            yield scaled_weight(folder, entry, scale, block)
        elif entry is not None and entry.dtype in ("I8", "U8"):
            shape = (*entry.shape[:-1], entry.shape[-1] * 2)
            yield float4_weight(folder, weight, entry, scale, shape)


def read_mxfp4(folder: Folder) -> Iterator[Found]:
    """gpt-oss: the experts of a layer in one tensor, which the model wants with inputs and outputs exchanged."""
    for name, entry in folder.entries.items():
        weight = name.removesuffix("_blocks")
        scale = folder.entries.get(f"{weight}_scales")
        if weight == name or scale is None:
            continue
        if len(entry.shape) != 4 or entry.shape[:-1] != scale.shape:
            raise unfit(entry, scale)
        experts, rows, groups, packed = entry.shape
        shape = (experts, groups * packed * 2, rows)
        yield Found(weight, Float4Experts(shape, folder.dtype, packed * 2), (name, scale.name))


def read_compressed(folder: Folder) -> Iterator[Found]:
    """compressed-tensors, and FP8 by row (fbgemm) or by tensor (modelopt), which name their scales alike."""
    _refuse_sparse(folder)
    for module, scale in ending_in(folder, ".weight_scale"):
        packed = folder.entries.get(f"{module}.weight_packed")
        entry = folder.entries.get(f"{module}.weight")
        if packed is not None and packed.dtype == "I32":
            yield _integers(folder, module, packed, scale)
        elif packed is not None:
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            yield float4_weight(folder, f"{module}.weight", packed, scale, shape, f"{module}.weight_global_scale")
        elif entry is not None and entry.dtype in (*FLOAT8, "I8"):
            found = scaled_weight(folder, entry, scale, (_scheme(folder, module) or {}).get("block_structure"))
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


def _integers(folder: Folder, module: str, words: TensorEntry, scale: TensorEntry) -> Found:
    scheme = _scheme(folder, module)
    if scheme is None:
        raise CheckpointError(f"the config of {folder.checkpoint.root} does not say how {module} is quantised")
    bits = int(scheme.get("num_bits", 0))
    group = int(scheme.get("group_size") or -1)
    per_row = scale.shape[-1] if scale.shape else 1
    if bits not in range(1, 9):
        raise unfit(words, scale)
    columns = per_row * group if group > 0 else words.shape[-1] * 32 // bits
    if len(words.shape) != 2 or words.shape[-1] != -(-columns * bits // 32):
        raise unfit(words, scale)
    zeros, order = (folder.entries.get(f"{module}.weight_{part}") for part in ("zero_point", "g_idx"))
    packed = Integers((words.shape[0], columns), folder.dtype, bits, group if group > 0 else columns, zeros is not None)
    parts = (words, scale, zeros, order)
    return Found(f"{module}.weight", packed, tuple(part.name for part in parts if part is not None))


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


def read_bitsandbytes(folder: Folder) -> Iterator[Found]:
    """4 bits with a table and blocks of absmax, or 8 bits with one absmax a row."""
    for name, entry in folder.entries.items():
        if match := _BNB_STATE.fullmatch(name):
            yield _lookup4(folder, match[1], json_of(folder, entry))
        elif name.endswith(".SCB"):
            weight = part_of(folder, f"{name.removesuffix('SCB')}weight", entry)
            found = scaled_weight(folder, weight, entry, None)
            yield replace(found, packed=replace(found.packed, factor=1 / 127))  # type: ignore[call-arg]


def _lookup4(folder: Folder, weight: str, state: Mapping[str, Any]) -> Found:
    entry = part_of(folder, weight, None)
    absmax, table = (part_of(folder, f"{weight}.{part}", entry) for part in ("absmax", "quant_map"))
    sources: tuple[str, ...] = (weight, absmax.name, table.name)
    try:
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0.0)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the state of {weight} in {entry.extent.file} lacks shape or blocksize") from None
    elements = torch.Size(shape).numel()
    if block < 1 or -(-elements // block) != count_of(absmax) or -(-elements // 2) != count_of(entry) or len(shape) < 2:
        raise unfit(entry, absmax)
    if nested:
        parts = (f"{weight}.nested_absmax", f"{weight}.nested_quant_map")
        sources = (*sources, *(part_of(folder, part, entry).name for part in parts))
    return Found(weight, Lookup4(shape, folder.dtype, block, nested, offset), sources)


def read_torchao(folder: Folder) -> Iterator[Found]:
    """Tensor subclasses laid out flat: which class it is follows from the dtypes of its parts."""
    for name, entry in folder.entries.items():
        if not (match := _TORCHAO.fullmatch(name)):
            continue
        module, weight = match.groups()
        _refuse_torchao(folder, f"{module}._{weight}_", entry)
        scale = part_of(folder, f"{module}._{weight}_scale", entry)
        zero = folder.entries.get(f"{module}._{weight}_zero_point")
        if zero is not None and zero.shape != scale.shape:
            raise unfit(entry, zero)
        of_floats = zero is not None and zero.dtype in FLOATS
        found = _signed4(folder, entry, scale) if of_floats else scaled_weight(folder, entry, scale, None)
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
        raise unfit(packed, scale)
    groups = scale.shape[-2] if len(scale.shape) == len(shape) else 0
    if not groups or shape[-1] % groups:
        raise unfit(packed, scale)
    return Found("", Signed4(shape, folder.dtype, shape[-1] // groups), (packed.name, scale.name))


QUANTO = "._scale"  # how the names of its scales end


def read_quanto(folder: Folder) -> Iterator[Found]:
    """Eight bits by row. Of fewer bits the checkpoint does not say which shape they have."""
    for weight, scale in ending_in(folder, QUANTO):
        if f"{weight}._data._data" in folder.entries:
            raise UnsupportedError(
                f"{weight} in {folder.checkpoint.root} is quanto's qint4 or qint2, whose shape is stored nowhere: "
                "use a checkpoint in qint8 or qfloat8"
            )
        entry = part_of(folder, f"{weight}._data", scale)
        module = weight.rpartition(".")[0]
        beside = tuple(f"{module}.{part}" for part in ("input_scale", "output_scale"))
        yield replace(scaled_weight(folder, entry, scale, None), name=weight, beside=beside)


def read_quark(folder: Folder) -> Iterator[Found]:
    """AMD's Quark: FP8 and int8 by tensor or row, FP4 with exponents, and 4 bits in groups packed as AWQ does it."""
    steps = folder.config.get("algo_config") or ()
    if any(
        step.get("r4") or step.get("online_r1_rotation") for step in ([steps] if isinstance(steps, dict) else steps)
    ):
        raise UnsupportedError(
            f"{folder.checkpoint.root} is Quark with rotations of activations, which are not known here: "
            "use another checkpoint of this model"
        )
    for module, scale in ending_in(folder, ".weight_scale"):
        weight = part_of(folder, f"{module}.weight", scale)
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
        return _with_zeros(folder, scaled_weight(folder, weight, scale, said.get("block_size")), module)
    if weight.dtype == "U8" and dtype == "fp4" and said.get("scale_format") == "e8m0":
        return float4_weight(folder, weight.name, weight, scale, (*weight.shape[:-1], weight.shape[-1] * 2))
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
    if count_of(zeros) not in (1, count_of(scale)):
        raise unfit(folder.entries[found.sources[0]], zeros)
    return replace(found, sources=(*found.sources, zeros.name))


def _quark4(folder: Folder, module: str, words: TensorEntry, scale: TensorEntry, signed: bool) -> Found:
    zeros = part_of(folder, f"{module}.weight_zero_point", words)
    packing = (folder.config.get("export") or {}).get("pack_method", "reorder")
    order = AWQ_ORDER if packing == "reorder" else tuple(range(8))
    return nibbles_weight(folder, module, words, zeros, scale, order, signed)
