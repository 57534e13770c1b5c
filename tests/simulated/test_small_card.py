"""Where the card has no room for a prompt at once it comes in chunks.

Keys and values in host memory are transformers' own, which knows CUDA alone: they are not tried here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.judge import steady, traced_once
from lamina import AutoModel, BudgetError
from lamina.plan.planner import minimum_memory
from simulated.backend import Accelerator, Register

CONTEXT = 2048
NEW = 8


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("long")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=24, max_position_embeddings=CONTEXT, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1 + (parameter.dim() < 2)
    model.save_pretrained(made)
    return made


def load(folder: Path, accelerator: Accelerator, **memory: object) -> LlamaForCausalLM:
    return AutoModel.from_pretrained(
        str(folder), device=accelerator.device, context=CONTEXT, draft=None, attn_implementation="eager", **memory
    )


def least(folder: Path, accelerator: Accelerator) -> int:
    with pytest.raises(BudgetError) as caught:
        load(folder, accelerator, memory="4GB", device_memory=1)
    return caught.value.minimum_bytes


@pytest.mark.parametrize("extra", [0, 10_000_000])
def test_a_prompt_in_chunks_gives_the_tokens_of_a_whole_one(
    folder: Path, accelerator: Accelerator, register: Register, extra: int
) -> None:
    ids = torch.randint(3, 128, (1, 700), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = plain.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    device_memory = least(folder, accelerator) + extra
    accelerator.driver.reset_counts()
    with pytest.warns(UserWarning, match="it is taken in chunks of"):
        model = load(folder, accelerator, memory="4GB", device_memory=device_memory)
    with model.lamina as lamina:
        budget = lamina._engine.plan.budget
        whole = minimum_memory(lamina._engine.weights.schedule, budget)[1]
        assert budget.chunk_tokens and whole <= device_memory
        assert not budget.cache_layers and not budget.host_cache_bytes
        tokens = model.generate(ids.to(accelerator.device), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens.cpu(), wanted)
        assert accelerator.most_bytes_in_use <= device_memory
        assert lamina.stats.passes >= 700 // budget.chunk_tokens + NEW - 1
    del model
