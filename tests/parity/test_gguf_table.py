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
