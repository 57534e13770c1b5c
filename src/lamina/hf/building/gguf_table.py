"""GGUF architectures that transformers does not map: their configs and what llama.cpp did to their tensors, by a table.

Names of tensors come from the `gguf` package, which knows every architecture; here is what else a model needs. A
metadata key of an architecture that its row does not know may change what is computed, so a file that has one is
refused. Sources: llama.cpp's converter (`convert_hf_to_gguf.py`), the class of each row named beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.checkpoint.gguf import GgufFile
from lamina.errors import CheckpointError, UnsupportedError

SHARED: Mapping[str, str] = {  # the end of a metadata key, the field of a config
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
NEEDED = ("block_count", "embedding_length", "attention.head_count")
# Of the file, not of what is computed; the sizes of heads and rotations are looked at below.
OTHERWISE = (
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *(f"rope.scaling.{part}" for part in ("type", "factor", "original_context_length", "finetuned")),
)
SCALINGS = ("none", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: transformers'.
        keys: metadata keys and config fields beside `SHARED`.
        processor: the architecture whose tensors llama.cpp changes in the same way, of those that transformers knows.
        tensors: config fields that are true where a tensor of this name is in the file.
        fixed: config fields that a file does not say.
    """

    model_type: str
    keys: Mapping[str, str]
    processor: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


BIASES = {"attention_bias": "blk.0.attn_q.bias"}
ARCHITECTURES: Mapping[str, Architecture] = {
    # CommandR2Model
    "command-r": Architecture(
        "cohere", {**NORM, "logit_scale": "logit_scale"}, tensors={**BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"}
    ),
    # Cohere2Model; which layers have the window is the same in llama.cpp and in transformers' default
    "cohere2": Architecture(
        "cohere2", {**NORM, "logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"}, tensors=BIASES
    ),
    # GraniteModel, a LlamaModel: queries and keys are in llama's order
    "granite": Architecture(
        "granite",
        {
            **RMS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        "llama",
        {**BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    # Olmo2Model; with a window it is OLMo 3
    "olmo2": Architecture("olmo2", RMS, tensors=BIASES),
    # OlmoeModel
    "olmoe": Architecture(
        "olmoe",
        {**RMS, "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        "qwen3moe",
        BIASES,
    ),
    # SeedOssModel
    "seed_oss": Architecture(
        "seed_oss",
        RMS,
        tensors={**BIASES, "attention_out_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    # SmolLM3Model, a LlamaModel; which layers do not rotate is the same in llama.cpp and in transformers' default
    "smollm3": Architecture("smollm3", RMS, "llama", {**BIASES, "mlp_bias": "blk.0.ffn_up.bias"}),
}


def row_of(file: GgufFile) -> Architecture | None:
    """The row of a file's architecture; None where there is none."""
    return ARCHITECTURES.get(str(file.get("general.architecture")))


def fields_of(file: GgufFile, row: Architecture) -> dict[str, Any]:
    """The fields of a config, from the metadata.

    Raises:
        UnsupportedError: there is a key that this row does not know.
        CheckpointError: one that it needs is missing.
    """
    architecture = str(file.get("general.architecture"))
    prefix = f"{architecture}."
    said = {key.removeprefix(prefix): file.get(key) for key in file.fields if key.startswith(prefix)}
    known = {**SHARED, **row.keys}
    if unknown := sorted(said.keys() - known.keys() - set(OTHERWISE)):
        raise UnsupportedError(
            f"{file.path} says {prefix}{unknown[0]}, which is not known here for {architecture}: use the safetensors"
        )
    if missing := next((key for key in NEEDED if key not in said), None):
        raise CheckpointError(f"{file.path} ({architecture}) lacks {prefix}{missing}: fetch it again")
    found = {own: said[key] for key, own in known.items() if key in said}
    found |= {own: name in file.checkpoint.tensors for own, name in row.tensors.items()}
    found |= row.fixed
    return found | _heads(file, said)


def _heads(file: GgufFile, said: Mapping[str, Any]) -> dict[str, Any]:
    """The size of a head, and how it is rotated."""
    size = said.get("attention.key_length") or said["embedding_length"] // said["attention.head_count"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, size) != size:
            raise UnsupportedError(
                f"{file.path} has heads of {size} and a {key} of {said[key]}, which is not known here: "
                "use the safetensors"
            )
    if (scaling := said.get("rope.scaling.type", "none")) not in SCALINGS:
        raise UnsupportedError(f"{file.path} scales rotations by {scaling!r}, which is not known here for it")
    base = said.get("rope.freq_base")
    rope = {} if base is None else {"rope_parameters": {"rope_type": "default", "rope_theta": float(base)}}
    return {"head_dim": size, **rope}
