"""GGUF architectures that transformers does not map: a file written as llama.cpp's converter does holds the model.

The writer here follows `convert_hf_to_gguf.py`, its classes named in `gguf_table.py`, and shares nothing with the
reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.gguf_files import write_tensors
from helpers.judge import minimum_of, steady, streamed_model
from lamina import UnsupportedError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
DEEPSEEK_YARN = {**YARN, "mscale": 0.5, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 1.0}
GLM = {
    "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "tie_word_embeddings": False,
}  # fmt: skip
# Files that hold what the converter changed: by case the architecture, the model's type, further fields, and more.
CHANGED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gpt-oss": ("gpt-oss", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
        "sliding_window": 4, "layer_types": None, "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False}}, {}),
    "gpt-oss in MXFP4": ("gpt-oss", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64,
        "sliding_window": 4, "hidden_size": 192, "intermediate_size": 96}, {"experts": "MXFP4"}),
    "deepseek v3": ("deepseek2", "deepseek_v3", {**MLA, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "rope_parameters": DEEPSEEK_YARN}, {}),
    "kimi": ("deepseek2", "deepseek_v3", {**MLA, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 2.8}, {}),
    "deepseek v3, an older file": ("deepseek2", "deepseek_v3", {**MLA, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0}, {"older": True}),
    "deepseek v2": ("deepseek2", "deepseek_v2", {**MLA, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy", "rope_parameters": DEEPSEEK_YARN}, {}),
    "deepseek v2 lite": ("deepseek2", "deepseek_v2", {**MLA, "q_lora_rank": None, "n_shared_experts": 2}, {}),
    "glm4moe": ("glm4moe", "glm4_moe", {**GLM, "attention_bias": True, "use_qk_norm": True}, {}),
    "glm4moe air": ("glm4moe", "glm4_moe", {**GLM, "attention_bias": True, "use_qk_norm": False}, {"mtp": 1}),
    "qwen3next": ("qwen3next", "qwen3_next", {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 96, "linear_key_head_dim": 32,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4, "tie_word_embeddings": False}, {}),
    "qwen3next, an older file": ("qwen3next", "qwen3_next", {"head_dim": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 96,
        "linear_key_head_dim": 32, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}, {"older": True}),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # by case: the architecture, further fields of the config
    "command-r": ("command-r", {"logit_scale": 0.125, "use_qk_norm": False}),
    "command-r with norms": ("command-r", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 4}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "granite with biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "seed_oss": ("seed_oss", {"head_dim": 32, "attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
}
MODEL_TYPES = {"command-r": "cohere"}
LLAMAS = ("granite", "smollm3")  # the converter's LlamaModel reorders queries and keys
WRITTEN = {  # the writer's keys, by the config's
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "vocab_size": "vocab_size",
}
MOE = {
    "n_routed_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def tiny(architecture: str, fields: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(MODEL_TYPES.get(architecture, architecture), **{**SIZES, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            parameter.data = torch.randn(parameter.shape) * 0.05 + ("norm" in name)
    return model


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute`."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def stored(value: torch.Tensor, index: int) -> tuple[Any, torch.Tensor]:
    """What the file has of a matrix, of types in turn, and the numbers that these are."""
    kind = ("Q8_0", "F16", "Q8_0", "BF16")[index % 4]
    numbers = value.contiguous().numpy()
    if value.dim() < 2 or value.shape[-1] % 32:
        return numbers, value
    own = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(numbers, own)
    meant = torch.from_numpy(np.array(gguf.quants.dequantize(packed, own), np.float32)).reshape(value.shape)
    return (numbers.astype(np.float16) if kind == "F16" else (packed, own)), meant


def write(folder: Path, architecture: str, model: PreTrainedModel, more: dict[str, Any] | None = None) -> Path:
    """The model's GGUF file. Its own weights become what the file's types left of them."""
    folder.mkdir()
    config = model.config
    own = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(own, config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        base, _, ending = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        if base.endswith("experts.gate_up_proj"):
            layer, parts = base.split(".")[2], []
            for which, part in zip(("gate", "up"), parameter.data.chunk(2, 1), strict=True):
                tensors[f"blk.{layer}.ffn_{which}_exps.weight"], meant = stored(part, index)
                parts.append(meant)
            parameter.data = torch.cat(parts, 1)
            continue
        if base.endswith("experts.down_proj"):
            target = f"blk.{base.split('.')[2]}.ffn_down_exps.weight"
            tensors[target], parameter.data = stored(parameter.data, index)
            continue
        target = names.get_name(base)
        assert target is not None, name
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            base.rpartition(".")[2]
        )
        value, meant = stored(parameter.data, index)
        if architecture in LLAMAS and heads and ending == "weight":
            value, _ = stored(permuted(parameter.data, heads), index)
        elif architecture in LLAMAS and heads:
            value = permuted(parameter.data, heads).numpy()
        tensors[f"{target}.{ending}"], parameter.data = value, meant
    values: dict[str, Any] = {key: getattr(config, own) for own, key in WRITTEN.items() if hasattr(config, own)}
    values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    if architecture.startswith(("command", "cohere")):
        values["rope.scaling.type"] = "none"
    if architecture == "cohere2":
        values |= {"attention.sliding_window": config.sliding_window, "rope.dimension_count": 64}
    if architecture == "seed_oss":
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    path = folder / "model.gguf"
    write_tensors(path, architecture, {**values, **(more or {})}, tensors)
    return path


def lossless(architecture: str, kind: str, fields: dict[str, Any], experts: str = "") -> PreTrainedModel:
    """A model whose weights are the same numbers in every type that they are stored in."""
    model = tiny(kind, fields)
    random = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        whole = torch.randint(-200, 201, value.shape, generator=random) / 1024
        if name.endswith("e_score_correction_bias"):
            whole *= 4
        if value.dim() > 1 and experts and "experts" in name and "bias" not in name:
            whole = torch.tensor([-6.0, -4.0, 4.0, 6.0])[torch.randint(4, value.shape, generator=random)] / 128
        elif value.dim() > 1 and value.shape[-1] > 4 and not name.endswith("_bias"):
            whole = torch.tensor([-127.0, 0.0, 127.0])[torch.randint(3, value.shape, generator=random)] / 2048
        value.copy_(whole + (value.dim() == 1 and name.endswith("norm.weight") and kind != "qwen3_next"))
    return model


def pieces(architecture: str, config: Any, name: str, value: torch.Tensor, older: bool) -> dict[str, torch.Tensor]:
    """`modify_tensors` of the converter's classes: what becomes of a parameter, by the converter's names."""
    base, _, last = name.rpartition(".")
    if name.endswith("experts.gate_up_proj"):
        across = architecture == "gpt-oss"
        value = value.transpose(1, 2) if across else value
        gate, up = (value[:, ::2], value[:, 1::2]) if across else value.chunk(2, 1)
        return {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
    if name.endswith("experts.gate_up_proj_bias"):
        return {f"{base}.gate_proj.bias": value[:, ::2], f"{base}.up_proj.bias": value[:, 1::2]}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": value.transpose(1, 2) if architecture == "gpt-oss" else value}
    if last in ("down_proj_bias", "e_score_correction_bias"):
        return {f"{name.removesuffix('_bias')}.bias": value}
    if last == "sinks":
        return {f"{name}.weight": value}
    if name.endswith("kv_b_proj.weight") and not older:
        heads = value.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        return {
            name.replace("kv_b_proj", "k_b_proj"): keys.transpose(1, 2),
            name.replace("kv_b_proj", "v_b_proj"): values,
        }
    return {name: value} if architecture != "qwen3next" else next_pieces(config, name, value, older)


def next_pieces(config: Any, name: str, value: torch.Tensor, older: bool) -> dict[str, torch.Tensor]:
    """`Qwen3NextModel.modify_tensors`; older files have one projection as it is."""
    if name.endswith("A_log"):
        return {name: -torch.exp(value)}
    if name.endswith("dt_bias"):
        return {name.replace("dt_bias", "dt_proj.bias"): value}
    if "conv1d" in name:
        return {name: value.squeeze()}
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return {name: value + 1}
    if "in_proj_qkvz" not in name or older:
        return {name: value}
    keys, wide = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
    wide *= config.linear_value_head_dim
    mixed = value.t().reshape(config.hidden_size, config.linear_num_key_heads, -1).split([keys, keys, wide, wide], -1)
    q, k, v, z = (part.reshape(config.hidden_size, -1) for part in mixed)
    layer = name.split(".")[2]
    return {f"blk.{layer}.attn_qkv.weight": torch.cat([q, k, v], -1).t(), f"blk.{layer}.attn_gate.weight": z.t()}


def said_of(architecture: str, config: Any, older: bool) -> dict[str, Any]:
    """`set_gguf_parameters` of the converter's classes."""
    said: dict[str, Any] = {
        key: own for name, key in {**WRITTEN, **MOE}.items() if (own := getattr(config, name, None)) is not None
    }
    rope = config.rope_parameters
    said["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        said |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        said["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        said |= {f"rope.scaling.yarn_{beta}": rope[beta] for beta in ("beta_fast", "beta_slow") if beta in rope}
    head = getattr(config, "head_dim", None)
    said |= {"attention.key_length": head, "attention.value_length": head}
    if architecture == "gpt-oss":
        said["attention.sliding_window"] = config.sliding_window
        said["expert_feed_forward_length"] = config.intermediate_size
    if architecture in ("glm4moe", "qwen3next"):
        said["rope.dimension_count"] = int(head * rope["partial_rotary_factor"])
    if architecture == "glm4moe":
        said["expert_gating_func"] = 2
    if architecture == "qwen3next":
        said |= {
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        }
        said.pop("expert_weights_norm")
    if architecture == "deepseek2":
        said |= latent(config, older)
        if not said["expert_weights_norm"]:
            said.pop("expert_weights_norm")
    return said


def latent(config: Any, older: bool) -> dict[str, Any]:
    """`DeepseekV2Model.set_gguf_parameters`; older files have heads as they are, and no key of their own for them."""
    rank, key = config.kv_lora_rank, config.qk_nope_head_dim + config.qk_rope_head_dim
    said = {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.key_length": key,
        "attention.value_length": config.v_head_dim,
    }
    if not older:  # an older file of V3 has the correction alone
        said["expert_gating_func"] = 2 if config.model_type == "deepseek_v3" else 1
    if config.q_lora_rank is not None:
        said["attention.q_lora_rank"] = config.q_lora_rank
    if not older:
        said |= {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + config.qk_rope_head_dim,
            "attention.value_length": rank,
            "attention.key_length_mla": key,
            "attention.value_length_mla": config.v_head_dim,
        }
    if config.rope_parameters.get("mscale_all_dim"):
        said["rope.scaling.yarn_log_multiplier"] = 0.1 * config.rope_parameters["mscale_all_dim"]
    return said


def convert(folder: Path, case: str, more: dict[str, Any] | None = None) -> tuple[PreTrainedModel, Path]:
    """A model, and its file. Its weights are what the file has."""
    architecture, kind, fields, how = CHANGED[case]
    model = lossless(architecture, kind, fields, how.get("experts", ""))
    own = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(own, model.config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        for target, piece in pieces(architecture, model.config, name, value, bool(how.get("older"))).items():
            mapped = target if target.startswith("blk.") else names.get_name(target, (".weight", ".bias"))
            assert mapped is not None, target
            experts, whole = how.get("experts", "") if "exps" in mapped else "", piece.contiguous()
            tensors[mapped] = packed(whole, len(tensors), experts) if mapped.endswith(".weight") else whole.numpy()
            if name.endswith("A_log"):
                value.copy_(torch.log(-piece))
    if model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    said = said_of(architecture, model.config, bool(how.get("older")))
    if how.get("mtp"):
        said |= {"block_count": said["block_count"] + 1, "nextn_predict_layers": 1}
        tensors[f"blk.{model.config.num_hidden_layers}.nextn.eh_proj.weight"] = np.zeros((256, 512), np.float32)
    folder.mkdir()
    path = folder / "model.gguf"
    write_tensors(path, architecture, {**said, **(more or {})}, tensors)
    return model, path


def packed(value: torch.Tensor, index: int, kind: str) -> Any:
    """A tensor in one of several types, which all hold its numbers as they are."""
    stored_as = gguf.GGMLQuantizationType[kind or ("Q8_0", "F16", "BF16", "Q8_0", "F32")[index % 5]]
    numbers = value.float().numpy()
    if value.dim() < 2 or value.shape[-1] % 32 or stored_as.name == "F32":
        return numbers
    raw = gguf.quants.quantize(numbers, stored_as)
    assert np.array_equal(gguf.quants.dequantize(raw, stored_as).reshape(numbers.shape), numbers)
    return numbers.astype(np.float16) if stored_as.name == "F16" else (raw, stored_as)


@pytest.mark.parametrize("case", CHANGED)
def test_what_the_converter_changed_is_changed_back(case: str, tmp_path: Path) -> None:
    model, path = convert(tmp_path / "gguf", case)
    ids = torch.tensor([[5, 9, 23, 17, 40, 3, 77, 8, 61, 30, 11, 4]])
    with torch.no_grad():
        wanted = model(ids).logits
    for memory in (3 << 30, minimum_of(path, dtype=torch.float32)):
        with streamed_model(path, memory, dtype=torch.float32).lamina as lamina:
            assert isinstance(lamina.model, type(model))
            state = lamina.model.state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(state[name].clone(), value), name
            with torch.no_grad():
                found = lamina.model(ids).logits
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_model(case: str, tmp_path: Path) -> None:
    architecture, fields = CASES[case]
    model = tiny(architecture, fields)
    path = write(tmp_path / "gguf", architecture, model)
    ids = torch.tensor([[5, 9, 23, 17, 40, 3, 77]])
    with torch.no_grad():
        wanted = model(ids).logits
    for memory in (3 << 30, minimum_of(path, dtype=torch.float32)):
        with streamed_model(path, memory, dtype=torch.float32).lamina as lamina:
            assert isinstance(lamina.model, type(model))
            own = dict(lamina.model.named_parameters())
            for name, parameter in model.named_parameters():
                assert torch.equal(own[name].clone(), parameter), name
            with torch.no_grad():
                found = lamina.model(ids).logits
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
            assert lamina.model.tokenizer.decode([5, 9]) == "&*"


def test_a_key_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gguf", "olmo2", tiny("olmo2", {}), {"attention.sliding_window": 16})
    with pytest.raises(UnsupportedError, match=r"says olmo2.attention.sliding_window, which is not known here"):
        streamed_model(path, 3 << 30)


@pytest.mark.parametrize("scaling", ["longrope", "mrope"])
def test_rotations_that_are_not_known_are_refused(scaling: str, tmp_path: Path) -> None:
    path = write(tmp_path / "gguf", "olmo2", tiny("olmo2", {}), {"rope.scaling.type": scaling})
    with pytest.raises(UnsupportedError, match=f"scales rotations by '{scaling}'"):
        streamed_model(path, 3 << 30)


def test_heads_that_are_rotated_in_part_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gguf", "seed_oss", tiny("seed_oss", {"head_dim": 32}), {"rope.dimension_count": 16})
    with pytest.raises(UnsupportedError, match=r"heads of 32 and a rope.dimension_count of 16"):
        streamed_model(path, 3 << 30)
