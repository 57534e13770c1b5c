"""Checkpoints that were quantised before they were published, streamed as they are stored.

transformers loads these with a package for each method, most of which want a GPU, and several write in place, which
cannot be recorded. What the stored tensors mean is well defined however, so it is said here: the tensors that make
up one weight become one `DiskTensor` whose expression is their unpacking (`lamina.codec.quantized_layouts`).
The readers, one for each method, are in `quantized_numbers` and `quantized_words`.
transformers then builds an ordinary model from it, renames, merges and all; the bytes that stream are the packed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lamina.checkpoint import Checkpoint
from lamina.errors import CheckpointError, RequestError, UnsupportedError
from lamina.hf.building.quantized_numbers import (
    QUANTO,
    read_bitsandbytes,
    read_compressed,
    read_fp8,
    read_mxfp4,
    read_quanto,
    read_quark,
    read_torchao,
)
from lamina.hf.building.quantized_parts import FLOATS, Folder, Reader
from lamina.hf.building.quantized_words import (
    read_aqlm,
    read_awq,
    read_bitnet,
    read_gptq,
    read_hqq,
    read_mlx,
    read_vptq,
)
from lamina.hf.internals import Conv1D
from lamina.tensors.disk import DiskTensor
from lamina.tensors.expressions import Computed

NOT_READ_ALONE = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}


QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of a config


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
    if any(name.endswith(f".weight{QUANTO}") for name in checkpoint.tensors):
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


_READERS: Mapping[str, Reader] = {
    "fp8": read_fp8,
    "mxfp8": read_fp8,
    "mxfp4": read_mxfp4,
    "compressed-tensors": read_compressed,
    "fbgemm_fp8": read_compressed,
    "gptq": read_gptq,
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "hqq": read_hqq,
    "torchao": read_torchao,
    "bitnet": read_bitnet,
    "quanto": read_quanto,
    "aqlm": read_aqlm,
    "quark": read_quark,
    "vptq": read_vptq,
    "metal": read_mlx,
    "mlx": read_mlx,
}
