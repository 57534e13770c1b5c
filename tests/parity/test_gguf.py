"""A GGUF file holds the very parameters that transformers unpacks from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers.gguf_files import FAMILIES, PORTED, SHARED, llama3_divisors, write_model, write_tensors
from helpers.judge import answers, minimum_of, reads_on_demand, steady, streamed_model
from lamina import AutoModel

MEMORY = 3 << 30
MIXED = ("Q4_K", "Q8_0", "Q6_K", "Q4_0", "F16", "Q5_K")


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def reference(path: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model, with the config given: it leaves some sizes that are in the file at their defaults."""
    own = copy.deepcopy(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=own, dtype=dtype
    )
    return model.eval()


def assert_same_parameters(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    own = dict(model.named_parameters())
    wanted = dict(expected.named_parameters())
    assert own.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert torch.equal(own[name].clone(), parameter), name


@pytest.mark.parametrize("family", [*FAMILIES, *PORTED])
def test_every_parameter_is_transformers_own(family: str, tmp_path: Path) -> None:
    kinds = ("Q8_0",) if family == "qwen35moe" else MIXED  # transformers cannot join experts of two types
    path = write_model(tmp_path, family, kinds)
    with streamed_model(path, MEMORY, dtype=torch.float32).lamina as lamina:
        assert_same_parameters(lamina.model, reference(path, lamina.model.config))


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gemma3"])
def test_quantised_types_that_are_rare_here_are_unpacked_too(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, family, ("Q2_K", "IQ4_XS", "Q3_K", "Q5_1", "IQ4_NL", "Q4_1", "IQ2_XS", "Q5_0", "BF16"))
    with streamed_model(path, MEMORY, dtype=torch.bfloat16).lamina as lamina:
        assert_same_parameters(lamina.model, reference(path, lamina.model.config, torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2moe", "gpt2", "qwen35moe"])
def test_the_smallest_budget_gives_the_answers_of_the_largest(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, family, MIXED)
    prompt = torch.arange(5, 17).view(2, 6)
    with streamed_model(path, MEMORY).lamina as lamina:
        assert not lamina.plan.streams
        wanted = answers(lamina.model, prompt)
    with reads_on_demand() as late, streamed_model(path, minimum_of(path)).lamina as lamina:
        assert lamina.plan.streams
        assert all(map(torch.equal, answers(lamina.model, prompt), wanted))
        assert not late


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", MIXED)
    prompt = torch.arange(5, 17).view(2, 6)
    with (
        torch.no_grad(),
        streamed_model(path, MEMORY, dtype=torch.float32).lamina as lamina,
    ):
        expected = reference(path, lamina.model.config)(prompt).logits
        torch.testing.assert_close(lamina.model(prompt).logits, expected, rtol=1e-4, atol=1e-4)


def test_mixtral_is_a_llama_with_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, rope_theta=10000.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    path = tmp_path / "model.gguf"
    values = {**SHARED, **FAMILIES["llama"], "expert_count": 4, "expert_used_count": 2}
    write_tensors(path, "llama", values, as_llama_cpp(model.state_dict(), config))
    prompt = torch.arange(5, 17).view(2, 6)
    with torch.no_grad(), streamed_model(path, MEMORY, dtype=torch.float32).lamina as lamina:
        assert isinstance(lamina.model, MixtralForCausalLM)
        assert_same_parameters(lamina.model, model)
        torch.testing.assert_close(lamina.model(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-4)


def as_llama_cpp(state: dict[str, torch.Tensor], config: MixtralConfig) -> dict[str, np.ndarray]:
    """Mixtral's weights as llama.cpp's converter names and orders them."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate.": "ffn_gate_inp.", "model.layers.": "blk.",
        "mlp.experts.down_proj": "ffn_down_exps.weight",
    }  # fmt: skip
    stored = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        values = tensor.float()
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, 256).transpose(1, 2).reshape(values.shape)
        if "gate_up_proj" in name:
            for part, half in zip(("gate", "up"), values.chunk(2, dim=1), strict=True):
                stored[name.replace("mlp.experts.gate_up_proj", f"ffn_{part}_exps.weight")] = half.contiguous().numpy()
        else:
            stored[name] = values.contiguous().numpy()
    return stored


@pytest.mark.parametrize("others", [False, True])
def test_divided_frequencies_are_those_of_llama_cpp(others: bool, tmp_path: Path) -> None:
    divisors = np.linspace(1, 3, 32, dtype=np.float32) if others else llama3_divisors(8.0)
    path = write_model(tmp_path, "llama", extra={"rope_freqs.weight": divisors})
    with AutoModel.from_pretrained(str(path), memory=MEMORY, device="cpu").lamina as lamina:
        plain = 10000.0 ** -(torch.arange(32) / 32)
        found = lamina.model.model.rotary_emb.inv_freq
        torch.testing.assert_close(found, plain / torch.from_numpy(divisors), rtol=1e-4, atol=0)
