"""A GGUF file holds the very parameters that transformers decodes from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gguf_files import FAMILIES, write_model
from parity.judge import answers, minimum_of, reads_on_demand, steady, streamed_model

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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_transformers_own(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, family, MIXED)
    with streamed_model(path, MEMORY, dtype=torch.float32).lamina as lamina:
        assert_same_parameters(lamina.model, reference(path, lamina.model.config))


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gemma3"])
def test_quantised_types_that_are_rare_here_are_decoded_too(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, family, ("Q2_K", "IQ4_XS", "Q3_K", "Q5_1", "IQ4_NL", "Q4_1", "IQ2_XS", "Q5_0", "BF16"))
    with streamed_model(path, MEMORY, dtype=torch.bfloat16).lamina as lamina:
        assert_same_parameters(lamina.model, reference(path, lamina.model.config, torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2moe", "gpt2"])
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
