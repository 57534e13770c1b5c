"""GGUF architectures that transformers does not map: their configs and what llama.cpp did to their tensors, by a table.

Names of tensors come from the `gguf` package, which knows every architecture; here is what else a model needs. A
metadata key of an architecture that its row does not know may change what is computed, so a file that has one is
refused. Sources: llama.cpp's converter (`convert_hf_to_gguf.py`, `conversion/*.py`), the class of each row named
beside it; what a key that is missing means is in llama.cpp's `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.checkpoint.gguf import GgufFile
from lamina.errors import CheckpointError, UnsupportedError
from lamina.hf.building.gguf_rules import (
    Rule,
    across,
    as_it_is,
    gate_and_up,
    in_turn,
    keys_and_values,
    log_of_minus,
    minus_one,
    queries_to_gates,
)

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
YARN = {  # what else of yarn a config may say
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}
EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
SOFTMAX, SIGMOID = 1, 2  # `expert_gating_func`
FUSED = (  # experts' two halves, which newer files may hold as one
    Rule("experts.gate_up_proj", ("ffn_gate_up_exps.weight",), as_it_is),
    Rule("experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), gate_and_up),
)
CORRECTED = (*FUSED, Rule("e_score_correction_bias", ("exp_probs_b.bias",), as_it_is))
# Experts by groups, by how many there are, where a file is older than the key: DeepSeek V2's and V3's.
GROUPS = {160: (8, 3), 256: (8, 4)}
GLM_LITE = (47, 154880)  # layers and words of GLM 4.7 Flash, which says nothing of its gate
Said = Mapping[str, Any]
Fields = Callable[[Said, GgufFile], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: transformers'.
        keys: metadata keys and config fields beside `SHARED`.
        processor: the architecture whose tensors llama.cpp changes in the same way, of those that transformers knows.
        tensors: config fields that are true where a tensor of this name is in the file.
        fixed: config fields that a file does not say.
        read: gives the fields that are not one key each.
        looked_at: the keys that `read` looks at.
        needed: keys without which there is no config.
        rules: parameters that are not a tensor of the file as it is; None where `processor` tells.
        partial: whether a part of each head may be rotated.
        yarn: transformers' own way of yarn for this architecture.
    """

    model_type: str
    keys: Mapping[str, str]
    processor: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read: Fields | None = None
    looked_at: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    rules: tuple[Rule, ...] | None = None
    partial: bool = False
    yarn: Mapping[str, Any] = field(default_factory=dict)


def _without_mtp(said: Said) -> int:
    """Layers but those that predict tokens beyond the next, which no model of transformers has as layers."""
    return int(said["block_count"]) - int(said.get("nextn_predict_layers", 0))


def _glm4moe(said: Said, file: GgufFile) -> dict[str, Any]:
    """GLM 4.5, whose last block predicts further tokens."""
    if said.get("expert_gating_func", SIGMOID) != SIGMOID:
        raise UnsupportedError(f"{file.path} chooses experts otherwise than by sigmoid: use the safetensors")
    return {"num_hidden_layers": _without_mtp(said), "num_nextn_predict_layers": 0}


def _deepseek2(said: Said, file: GgufFile) -> dict[str, Any]:
    """Latent attention: DeepSeek V2 (softmax), V3, Kimi K2, Moonlight (sigmoid), GLM 4.7 Flash."""
    layers, rotated = _without_mtp(said), said["rope.dimension_count"]
    key = said.get("attention.key_length_mla") or said["attention.key_length"]
    lite = (layers, file.checkpoint.tensors["token_embd.weight"].shape[0]) == GLM_LITE
    corrected = f"blk.{said.get('leading_dense_block_count', 0)}.exp_probs_b.bias" in file.checkpoint.tensors
    gate = said.get("expert_gating_func", SIGMOID if lite or corrected else SOFTMAX)  # no softmax is corrected
    if gate not in (SOFTMAX, SIGMOID):
        raise UnsupportedError(f"{file.path} chooses experts by function {gate}, which is not known here")
    groups, used = GROUPS.get(said["expert_count"], (1, 1))
    groups, used = said.get("expert_group_count", groups), said.get("expert_group_used_count", used)
    found = {
        "model_type": "glm4_moe_lite" if lite else "deepseek_v3" if gate == SIGMOID else "deepseek_v2",
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": said["attention.head_count"],  # in the file 1: llama.cpp computes on what is latent
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": said.get("attention.value_length_mla") or said["attention.value_length"],
        "q_lora_rank": said.get("attention.q_lora_rank"),
        "n_group": groups,
        "topk_group": used,
        "norm_topk_prob": said.get("expert_weights_norm", False),
        "routed_scaling_factor": said.get("expert_weights_scale") or 1.0,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }
    dense = said.get("leading_dense_block_count", 0)
    return found | ({"mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense)} if lite else {})


def _qwen3next(said: Said, file: GgufFile) -> dict[str, Any]:
    """Layers by their tensors; values by how many heads share them."""
    layers, tensors = _without_mtp(said), file.checkpoint.tensors
    full = [f"blk.{layer}.attn_q.weight" in tensors for layer in range(layers)]
    return {
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if each else "linear_attention" for each in full],
        "linear_value_head_dim": said["ssm.inner_size"] // said["ssm.time_step_rank"],
    }


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
    # GptOssModel (conversion/gpt_oss.py): experts' columns are rows, gate and up are every other column
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            **RMS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        rules=(
            Rule("experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), across, raw=True),
            Rule("experts.down_proj", ("ffn_down_exps.weight",), across, raw=True),
            Rule("experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), in_turn),
            Rule("experts.down_proj_bias", ("ffn_down_exps.bias",), as_it_is),
        ),
        yarn={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    # DeepseekV2Model, Glm4MoeLiteModel (conversion/deepseek.py, glm.py); src/models/deepseek2.cpp
    "deepseek2": Architecture(
        "deepseek_v3",
        {**RMS, **EXPERTS, "attention.kv_lora_rank": "kv_lora_rank"},
        read=_deepseek2,
        looked_at=(
            *("attention.key_length_mla", "attention.value_length_mla", "attention.q_lora_rank"),
            *("expert_gating_func", "nextn_predict_layers", "rope.scaling.yarn_log_multiplier"),
        ),
        needed=(
            *("attention.kv_lora_rank", "attention.key_length", "attention.value_length", "rope.dimension_count"),
            *("expert_count", "expert_used_count", "expert_feed_forward_length"),
        ),
        rules=(*CORRECTED, Rule("kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), keys_and_values)),
    ),
    # Glm4MoeModel (conversion/glm.py)
    "glm4moe": Architecture(
        "glm4_moe",
        {**RMS, **EXPERTS},
        tensors={**BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"},
        read=_glm4moe,
        looked_at=("expert_gating_func", "nextn_predict_layers"),
        needed=("expert_count", "expert_used_count", "expert_feed_forward_length"),
        rules=CORRECTED,
        partial=True,
    ),
    # Qwen3NextModel (conversion/qwen.py)
    "qwen3next": Architecture(
        "qwen3_next",
        {
            **RMS,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.group_count": "linear_num_key_heads",
            "ssm.time_step_rank": "linear_num_value_heads",
        },
        tensors=BIASES,
        read=_qwen3next,
        looked_at=(  # which layers have full attention is told by their tensors
            *("ssm.inner_size", "full_attention_interval", "attention.recurrent_layers", "nextn_predict_layers"),
        ),
        needed=("expert_count", "expert_used_count", "ssm.inner_size", "ssm.time_step_rank"),
        rules=(
            *FUSED,
            *(Rule(f"{norm}layernorm.weight", (), minus_one) for norm in ("input_", "post_attention_")),
            *(Rule(f"self_attn.{norm}_norm.weight", (), minus_one) for norm in "qk"),
            Rule("model.norm.weight", (), minus_one),
            Rule("A_log", (), log_of_minus),
            Rule("dt_bias", ("ssm_dt.bias",), as_it_is),
            Rule("in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), queries_to_gates),
        ),
        partial=True,
    ),
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
    if unknown := sorted(said.keys() - known.keys() - {*OTHERWISE, *YARN, *row.looked_at}):
        raise UnsupportedError(
            f"{file.path} says {prefix}{unknown[0]}, which is not known here for {architecture}: use the safetensors"
        )
    if missing := next((key for key in (*NEEDED, *row.needed) if said.get(key) is None), None):
        raise CheckpointError(f"{file.path} ({architecture}) lacks {prefix}{missing}: fetch it again")
    found: dict[str, Any] = {own: said[key] for key, own in known.items() if key in said}
    found |= {own: name in file.checkpoint.tensors for own, name in row.tensors.items()}
    found |= row.fixed
    found |= _latent_heads(said) if "kv_lora_rank" in found else _heads(file, said, row.partial)
    found |= row.read(said, file) if row.read is not None else {}
    rope = _rope(file, said, row.yarn)
    return found | {"rope_parameters": {**found.get("rope_parameters", {}), **rope}}


def _latent_heads(said: Said) -> dict[str, Any]:
    """Latent attention has heads of several sizes, which `read` tells; in yarn it scales by the whole of them."""
    scale = said.get("rope.scaling.yarn_log_multiplier")  # a tenth of the config's, as llama.cpp began with
    return {"rope_parameters": {"mscale": 10 * scale, "mscale_all_dim": 10 * scale} if scale else {}}


def _heads(file: GgufFile, said: Said, partial: bool) -> dict[str, Any]:
    """The size of a head, and how much of it is rotated."""
    size = said.get("attention.key_length") or said["embedding_length"] // said["attention.head_count"]
    rotated = said.get("rope.dimension_count", size)
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if said.get(key, size) != size:
            raise UnsupportedError(
                f"{file.path} has heads of {size} and a {key} of {said[key]}, which is not known here: "
                "use the safetensors"
            )
    return {"head_dim": size, "rope_parameters": {"partial_rotary_factor": rotated / size} if partial else {}}


def _rope(file: GgufFile, said: Said, yarn: Mapping[str, Any]) -> dict[str, Any]:
    """How rotations go, and how they are scaled for long texts."""
    kind, base = said.get("rope.scaling.type", "none"), said.get("rope.freq_base")
    if kind not in SCALINGS:
        raise UnsupportedError(f"{file.path} scales rotations by {kind!r}, which is not known here for it")
    own = {} if base is None else {"rope_theta": float(base)}
    if kind == "none" or not said.get("rope.scaling.factor"):
        return {"rope_type": "default", **own}
    own |= {"rope_type": kind, "factor": float(said["rope.scaling.factor"])}
    if length := said.get("rope.scaling.original_context_length"):
        own["original_max_position_embeddings"] = length
    if kind == "yarn":
        own |= dict(yarn) | {name: float(said[key]) for key, name in YARN.items() if key in said}
    return own
