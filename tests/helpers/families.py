"""Tiny random checkpoints of every causal-LM family, written in the layout of their original hub checkpoints.

A family is a transformers ``model_type``. ``tiny_config`` shrinks the family's default config by one generic
routine (each field name has a tiny value); what that cannot derive is a row in ``_OVERRIDES``. ``write_tiny``
builds the family's own class, gives every tensor seeded random values, and lets ``save_pretrained`` write the
checkpoint: transformers reverses its load-time conversions there, so the files look like the published ones.

This module knows nothing of Lamina: it only makes inputs for the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

_FAMILIES = """
    apertus arcee bamba biogpt bloom codegen cohere cohere2 dbrx deepseek_v2 deepseek_v3 doge dots1 ernie4_5
    ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neox gpt_oss granite granitemoe helium hunyuan_v1_dense hunyuan_v1_moe internlm3 jamba lfm2 llama
    llama4_text longcat_flash mamba2 minimax minimax_m2 mistral mixtral mpt nemotron olmo olmo2 olmo3 olmoe opt phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2 vaultgemma
    """
FAMILIES: tuple[str, ...] = tuple(_FAMILIES.split())

# Every further causal-LM family of transformers 5.23 that a tiny config can be made for and that generates on the CPU.
_MORE_FAMILIES = """
    afmoe aria_text axk1 axk2 bailing_hybrid bart beam bert bert-generation big_bird bigbird_pegasus bitnet
    blenderbot blenderbot-small camembert cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v32 deepseek_v4
    diffllama dots3_note_text electra ernie exaone_moe flint fuyu gemma3 gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text git glm4_moe_lite glm_moe_dsa gpt-sw3 gpt_neo gpt_neox_japanese gptj
    granite_swa granitemoe_swa granitemoehybrid granitemoeshared hrm_text hy_v3 hy_v4 hyperclovax inkling2_text
    inkling_text iquestcoder jais2 jetmoe kimi_linear kolibri1 laguna lfm2_moe lfm3 llama4 mamba marian mbart
    megatron-bert mellum mimo_v2_flash minicpm3 minimax_m3_vl_text ministral ministral3 mllama modernbert-decoder
    moshi moss_transcribe_diarize mvp nanochat nemotron_h olmo_hybrid openai-gpt pegasus persimmon plbart
    prophetnet qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp qwen4_exp_text recurrent_gemma reformer
    rembert roberta roberta-prelayernorm roc_bert roformer rwkv solar_open trocr whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xlstm xmod youtu zamba zamba2 zaya
"""
MORE_FAMILIES: tuple[str, ...] = tuple(_MORE_FAMILIES.split())

# The families, of both lists, with experts.
_MOE = """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa
    gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text
    inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4 llama4_text longcat_flash mellum
    mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
    qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text solar_open zaya
"""
MOE: frozenset[str] = frozenset(_MOE.split())

VOCAB = 256
HIDDEN = 64
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
INTERMEDIATE = 96
EXPERTS = 4
TOP_K = 2
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3  # token ids below this one are special


# The tiny value of every config field that is a size; a field is set only where the family's config has it.
_TINY: Mapping[str, Any] = MappingProxyType(
    {
        name: value
        for value, names in (
            (VOCAB, "vocab_size"),
            (HIDDEN, "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim lru_width"),
            (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
            (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
            (KV_HEADS, "num_key_value_heads num_kv_heads"),
            (HEAD_DIM, "head_dim v_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim"),
            (INTERMEDIATE, "intermediate_size ffn_dim ffn_hidden_size n_inner intermediate_size_mlp"),
            (INTERMEDIATE, "encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff dense_intermediate_size"),
            (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
            (TOP_K, "num_experts_per_tok moe_k moe_topk moe_top_k num_experts_per_token linear_num_key_heads"),
            (1, "n_shared_experts moe_num_shared_experts num_shared_experts first_k_dense_replace"),
            (1, "n_group topk_group num_expert_group"),
            (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_n_heads time_step_rank mamba_dt_rank"),
            (8, "sliding_window attention_chunk_size mamba_chunk_size chunk_size block_size query_pre_attn_scalar"),
            (16, "kv_lora_rank state_size ssm_state_size mamba_d_state"),
            (32, "moe_intermediate_size expert_ffn_hidden_size q_lora_rank"),
            (48, "shared_experts_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
            (VOCAB, "vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size"),
            (HIDDEN, "out_hidden_size embedding_dim pronunciation_embed_dim shape_embed_dim vision_output_dim"),
            (HIDDEN, "projector_input_dim projector_output_dim"),
            (16, "hidden_size_per_layer_input linear_head_dim attention_head_size index_head_dim indexer_head_dim"),
            (HEADS, "linear_num_heads index_n_heads"),
            (2, "depth num_hash_layers num_dense_layers"),
            (8, "rel_extent sliding_window_size window_size index_topk"),
            (32, "image_size"),
            (512, "model_max_length"),
            (512, "max_position_embeddings n_positions n_ctx max_seq_len keep_window_size"),
            (True, "is_decoder"),
            (PAD, "pad_token_id"),
            (BOS, "bos_token_id"),
            (EOS, "eos_token_id"),
        )
        for name in names.split()
    }
)

# Sizes that mean "off" where the default is None or 0: left as they are.
_KEEP_WHEN_OFF = frozenset({"sliding_window", "q_lora_rank", "n_shared_experts", "rotary_dim", "num_shared_experts"})

# Endings of the buffers that training sets; other saved buffers follow from the config.
_LEARNED_BUFFERS = ("bias", "layer_scalar")

_OVERRIDES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bamba": {"attn_layer_indices": [1, 3]},
        "cohere": {"logit_scale": 1.0, "use_qk_norm": True},
        "cohere2": {"logit_scale": 1.0},
        "deepseek_v3": {"n_group": 2, "topk_group": 1},
        "dbrx": {
            "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 500000.0},
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": INTERMEDIATE,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
            },
        },
        "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
        "dots1": {"n_shared_experts": 1},
        "ernie4_5_moe": {"moe_layer_end_index": LAYERS - 1},
        "falcon_h1": {"mamba_d_ssm": 128},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
        "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "head_dim": 8},
        "bailing_hybrid": {"head_dim": 8, "layer_group_size": 4},
        "cohere2_moe": {"logit_scale": 1.0},
        "deepseek_v4": {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "o_groups": 2,
            "o_lora_rank": 16,
            "num_hidden_layers": 5,
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        },
        "gemma3n_text": {
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        "gemma4_text": {"global_head_dim": 32},
        "gemma4_unified_text": {"global_head_dim": 32},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
        "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "nemotron_h": {"num_hidden_layers": 4},
        "qwen4_exp_text": {
            "indexer_n_heads": HEADS,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"] * 2},
        "roc_bert": {"concat_input": True},
        "xlstm": {"num_blocks": LAYERS, "qk_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 8},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
        "youtu": {"pad_token_id": None},
        "zamba": {
            "num_hidden_layers": 6,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        },
        "zamba2": {
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 5,
            "n_mamba_heads": 8,
            "adapter_rank": 8,
        },
        "zaya": {"num_experts_per_tok": 1},
        "mamba2": {"num_heads": 8, "n_groups": 2},
    }
)


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's config with tiny sizes, every kind of layer present at least once, and special tokens 0, 1, 2."""
    return CONFIG_MAPPING[family](**_tiny_fields(CONFIG_MAPPING[family](), _OVERRIDES.get(family, {})))


def _tiny_fields(default: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What to give the config's class so that it builds a tiny config of the same kind as ``default``."""
    kinds = default.to_dict()
    fields = {name: value for name, value in _TINY.items() if name in kinds and _wanted(name, kinds[name])}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in overrides:
            fields[name] = {"model_type": part.model_type} | _tiny_fields(part, _OVERRIDES.get(part.model_type, {}))
    if "qk_rope_head_dim" in kinds:  # latent attention derives head_dim, and has a key for every head
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = HEADS
    fields |= overrides
    shrunk = type(default)(**fields)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name not in fields and (kind := _every_kind(kinds.get(name), getattr(shrunk, name, None))):
            fields[name] = kind
    return fields


def _wanted(name: str, default: object) -> bool:
    return not (name in _KEEP_WHEN_OFF and not default)


def _every_kind(default: Iterable[str] | None, shrunk: list[str] | None) -> list[str] | None:
    """A per-layer list of the shrunk length with each kind of the default one, or None where that is so already."""
    if not default or not shrunk or set(default) <= set(shrunk):
        return None
    kinds = list(dict.fromkeys(default))
    return [kinds[i % len(kinds)] for i in range(len(shrunk))]


def write_tiny(
    family: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tie: bool | None = None,
    max_shard_size: str | int | None = None,
) -> None:
    """Write a tiny random checkpoint of ``family`` into ``folder``, as ``save_pretrained`` lays it out.

    ``tie`` sets ``tie_word_embeddings`` (None: the family's default); ``max_shard_size`` such as ``"200KB"`` gives
    several shards and an index.
    """
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    tiny_model(family, dtype=dtype, seed=seed, tie=tie).save_pretrained(folder, **shards)


def tiny_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, tie: bool | None = None
) -> PreTrainedModel:
    """The model that ``write_tiny`` saves, in evaluation mode, its own random state untouched by the caller's."""
    config = tiny_config(family)
    if tie is not None:
        config.tie_word_embeddings = tie
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_class(family).from_config(config, dtype=dtype)
    _enliven(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _model_class(family: str) -> Any:
    """The auto class of the family's published checkpoints: some hold a text model inside a multimodal one."""
    inside = (
        family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and "text_config" in CONFIG_MAPPING[family].sub_configs
    )
    return AutoModelForImageTextToText if inside else AutoModelForCausalLM


@torch.no_grad()
def _enliven(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give every tensor of the checkpoint values that show in the logits.

    Matrices get unit gain. Whatever transformers starts at a meaningful value (norm weights at one or zero, ``A_log``,
    ``dt_bias``, biases, router corrections) keeps it, plus noise.
    """
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    saved = model.state_dict()
    biases = [
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith(_LEARNED_BUFFERS) and name in saved
    ]
    named = sorted((*model.named_parameters(), *biases), key=lambda each: each[0])  # whatever order defines them
    for name, tensor in named:
        noise = torch.randn(tensor.shape, generator=generator)
        start = tensor.float()
        if not start.isfinite().all():
            raise ValueError(f"{name} is not initialised by transformers")
        if _is_matrix(start):
            # Small embeddings: where they are tied, large ones would make each token predict itself.
            gain = 0.2 if tensor is words is head else 1.0 if tensor is words or tensor is head else 2.0
            tensor.copy_(noise * gain / math.sqrt(tensor.shape[-1]))
        else:
            # Router corrections only choose: they show where they are as large as the scores they correct.
            tensor.copy_(start + (0.1 if isinstance(tensor, torch.nn.Parameter) else 0.5) * noise)
    head[:FIRST_WORD] *= 0.01  # special tokens do not win, so that generation runs to its full length


def _is_matrix(start: torch.Tensor) -> bool:
    """Whether a freshly initialised tensor is a zero-mean sample: a matrix that mixes, not a scale or an offset."""
    return start.ndim >= 2 and bool(start.mean().abs() < 0.3 * start.std())


def input_ids(config: PreTrainedConfig, length: int = 8, batch: int = 1, seed: int = 0) -> torch.LongTensor:
    """Random token ids of shape ``(batch, length)``, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, config.get_text_config().vocab_size, (batch, length), generator=generator)
    return ids  # type: ignore[return-value]
