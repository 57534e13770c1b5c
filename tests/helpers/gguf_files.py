"""Writes GGUF files for the tests: any header at all, and tiny random models with the `gguf` package's writer."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf import get_gguf_conversion_mapping
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

VOCABULARY = 96
HIDDEN = 256
SHARED = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": 64},
    "qwen2": {},
    "qwen3": {"attention.key_length": 64},
    "qwen2moe": {**EXPERTS, "expert_shared_feed_forward_length": 512},
    "qwen3moe": {**EXPERTS, "attention.key_length": 64},
    "gemma2": {"attention.key_length": 64, "attention.sliding_window": 16},
    "gemma3": {"attention.key_length": 64, "attention.sliding_window": 16},
    "phi3": {"attention.head_count_kv": 4, "rope.dimension_count": 64},
    "nemotron": {"rope.dimension_count": 64},
    "stablelm": {"attention.layer_norm_epsilon": 1e-5},
    "starcoder2": {"attention.layer_norm_epsilon": 1e-5},
    "falcon": {"attention.head_count_kv": 1},
    "gpt2": {"attention.layer_norm_epsilon": 1e-5},
    "bloom": {"attention.layer_norm_epsilon": 1e-5},
    "mamba": {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 16, "ssm.inner_size": 512},
    "lfm2": {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
    "minimax-m2": {**EXPERTS, "attention.key_length": 64, "rope.dimension_count": 32, "expert_gating_func": 2},
}
UNREAD = {  # keys that transformers does not read for every architecture
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.key_length": "head_dim",
}
HYBRID = {
    "attention.key_length": 64, "full_attention_interval": 2, "ssm.conv_kernel": 4, "ssm.state_size": 32,
    "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 256, "rope.dimension_count": 32,
    "rope.dimension_sections": [4, 4, 8, 0], "rope.freq_base": 10000.0,
}  # fmt: skip
PORTED = {  # architectures whose names only transformers knows
    "qwen35": HYBRID,
    "qwen35moe": {**HYBRID, **EXPERTS, "expert_shared_feed_forward_length": 512},
}
ATTENTION = "attn_norm post_attention_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm".split()
RECURRENT = "attn_norm post_attention_norm attn_qkv attn_gate ssm_alpha ssm_beta ssm_conv1d ssm_norm ssm_out".split()
DENSE = "ffn_gate ffn_up ffn_down".split()
MIXED = (
    "ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps ffn_gate_inp_shexp ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
).split()
ONLY_EPSILON = {"bloom", "gpt2", "stablelm", "starcoder2"}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: str, sizes: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:
    """A header, padded as the data that follow it need."""
    tensor_count, field_count = counts or (len(tensors), len(fields))
    raw = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join(fields) + b"".join(tensors)
    return raw + bytes(-len(raw) % alignment)


def blocks(kind: gguf.GGMLQuantizationType, shape: Sequence[int], seed: int) -> np.ndarray[Any, Any]:
    """Random blocks of any type with scales of a usual size, as rows of bytes."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    count = int(np.prod(shape)) // elements
    raw = random.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for at in HALVES.get(kind.name, ()):
        raw[:, at : at + 2] = random.uniform(0.001, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = random.integers(115, 122, count)
    if kind.name == "IQ1_M":  # an fp16 number in the top four bits of four words
        raw[:, 49:56:2] = raw[:, 49:56:2] & 15 | np.array([0x00, 0x00, 0x40, 0x10], np.uint8)
    return raw.reshape(*shape[:-1], shape[-1] // elements * nbytes)


HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where in a block of a type its fp16 numbers lie."""


def write_model(
    folder: Path,
    family: str,
    kinds: Sequence[str] = ("Q8_0",),
    *,
    more: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """A tiny random model of a GGUF architecture.

    Args:
        kinds: types of the matrices, taken in turn. Others are F32.
        more: metadata in place of the usual, without the architecture before its key.
        extra: tensors that no parameter is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    values = {**SHARED, **(FAMILIES | PORTED)[family], **(more or {})}
    if family in ONLY_EPSILON:
        values.pop("attention.layer_norm_rms_epsilon")
    write_tensors(path, family, values, {"token_embd.weight": np.zeros((VOCABULARY, HIDDEN), np.float32)})
    shapes = _shapes(path, family)
    tensors: dict[str, Any] = {}
    for index, (tensor_name, shape) in enumerate(sorted(shapes.items())):
        kind = gguf.GGMLQuantizationType[kinds[index % len(kinds)]]
        tensors[tensor_name] = _values(tensor_name, shape, kind, index)
    write_tensors(path, family, values, {**tensors, **(extra or {})})
    return path


def write_tensors(path: Path, family: str, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """A file with these tensors; metadata as in `write_model`."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    for key, value in values.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
            str: writer.add_string,
        }[type(value)]
        add(f"{family}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(VOCABULARY - 1)), "!!"])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_pad_token_id(0)
    for name, stored in tensors.items():
        raw, kind = stored if isinstance(stored, tuple) else (stored, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(path: Path, family: str) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a model's tensors, by transformers' names for them."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key, own in UNREAD.items():
        if key in (FAMILIES | PORTED)[family] and hasattr(config, own):
            setattr(config, own, (FAMILIES | PORTED)[family][key])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if family in PORTED:
        return _ported_shapes(family, config, model.state_dict())
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config.to_dict())
    shapes = {}
    parameters = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    for stored, name in get_gguf_hf_weights_map(model, processor).items():
        shape = parameters[name]
        if "gate_exps" in stored or "up_exps" in stored:
            shape = (shape[0], shape[1] // 2, shape[2])
        elif "gate_inp_shexp" in stored:
            shape = shape[1:]
        elif "conv" in stored and len(shape) == 3:
            shape = (shape[0], shape[2])
        elif family == "gpt2" and "blk" in stored and len(shape) == 2:
            shape = shape[::-1]
        shapes[stored if stored.endswith((".weight", ".bias")) or "ssm_" in stored else f"{stored}.weight"] = shape
    return shapes


def _ported_shapes(family: str, config: Any, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    mapping = get_gguf_conversion_mapping(family, config)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    names = ["token_embd.weight", "output_norm.weight", "output.weight"]
    for layer, kind in enumerate(config.layer_types):
        own = ATTENTION if kind == "full_attention" else RECURRENT
        names += [f"blk.{layer}.{each}.weight" for each in (*own, *(MIXED if "moe" in family else DENSE))]
        names += [f"blk.{layer}.ssm_a", f"blk.{layer}.ssm_dt.bias"] if own is RECURRENT else []
    shapes = {}
    for name in names:
        shape = tuple(state[rename_source_key(name, renamings, converters)[0]].shape)
        if "gate_exps" in name or "up_exps" in name:
            shape = (shape[0], shape[1] // 2, shape[2])
        elif "gate_inp_shexp" in name:
            shape = shape[1:]
        elif "conv" in name:
            shape = (shape[0], shape[2])
        shapes[name] = shape
    return shapes


def _values(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, seed: int) -> Any:
    random = np.random.default_rng(seed)
    if "ssm_a" in name:
        return -random.uniform(0.5, 2.0, shape).astype(np.float32)
    values = (random.standard_normal(shape) * 0.05 + ("norm" in name)).astype(np.float32)
    elements = gguf.GGML_QUANT_SIZES[kind][0]
    if len(shape) < 2 or shape[-1] % elements or "norm" in name or "conv" in name or kind.name == "F32":
        return values
    if kind.name == "F16":
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, kind), kind
    except NotImplementedError:
        return blocks(kind, shape, seed), kind


def llama3_divisors(factor: float, base: float = 10000.0, pairs: int = 32) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    found = []
    for index in range(pairs):
        wave = 2 * np.pi * base ** (index / pairs)
        smooth = (8192 / wave - 1) / 3
        found.append(1 if wave < 8192 / 4 else factor if wave > 8192 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)
