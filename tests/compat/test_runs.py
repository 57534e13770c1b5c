"""What a user does, on every supported version: ten families at the minimum, drafts, batches, experts, long texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from helpers.always import Always
from helpers.families import input_ids, tiny_model, write_tiny
from helpers.judge import CONTEXT, assert_equal, judge, minimum_of, plain_model, steady, streamed_model
from lamina import AutoModel
from lamina.hf.internals import cache_of
from lamina.hf.trace import _tensors_of
from lamina.speculative.decoder import MOST

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore::lamina.FallbackWarning")]

# what most are like; merged projections, traced with made-up numbers; what 5.24 rewrote; windows; experts; latent
# attention; a state beside attention, experts; a state alone; a cache of its own; all of it in one
TEN = "llama gpt2 codegen gemma3_text mixtral deepseek_v3 qwen3_next mamba2 minimax jamba".split()
NEW_TOKENS = 48
DAMPED = 0.002


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


@pytest.mark.parametrize("family", TEN)
def test_a_family_at_the_minimum(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    said = judge(tmp_path, family)
    assert assert_equal(said, said.minimum).lamina.plan.streams


# -- drafts


@pytest.fixture(scope="module")
def predictable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers say little: its text runs in circles, and half of its layers would say the same."""
    folder = tmp_path_factory.mktemp("drafts")
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= DAMPED
    model.save_pretrained(folder / "model")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder / "smaller")
    return folder / "model"


@pytest.mark.parametrize("draft", ["lookup", "self", "smaller"])
def test_a_draft(draft: str, predictable: Path) -> None:
    plain = plain_model(predictable)
    ids = input_ids(plain.config, 12)
    asked = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    wanted = plain.generate(ids, **asked)
    name = str(predictable.with_name(draft)) if draft == "smaller" else draft
    memory = minimum_of(predictable, draft=name)
    with (model := streamed_model(predictable, memory, draft=name)).lamina:
        assert model.lamina.plan.streams
        made, _ = model.lamina.decoder._draft(name, False)
        model.lamina.decoder._drafts[name] = made, Always(MOST, None, 0.0, must=True)
        assert torch.equal(model.generate(ids, **asked), wanted)
        stats = model.lamina.stats
        assert (stats.draft, stats.fallbacks) == (name, ())
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        assert stats.passes < NEW_TOKENS


# -- batches and experts


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_continuous_batch(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    answers = []
    with (model := streamed_model(tmp_path, minimum_of(tmp_path) + 50_000_000)).lamina:
        for each in (model, plain_model(tmp_path, family)):
            prompts = [input_ids(each.config, length=length, seed=length)[0].tolist() for length in (4, 3, 7)]
            got = each.generate_batch(
                prompts,
                GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
            )
            answers.append({tuple(one.prompt_ids): one.generated_tokens for one in got.values()})
        assert 0 < model.lamina.stats.passes < 15  # the prompts share passes
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "longcat_flash"])
def test_experts_on_demand(family: str, tmp_path: Path) -> None:
    """In transformers' registry, transposed with biases, and outside of the registry."""
    write_tiny(family, tmp_path)
    said = judge(tmp_path, family)
    model = assert_equal(said, said.minimum)
    stats = model.lamina.stats
    assert model.lamina.plan.expert_slots
    assert stats.experts_routed >= stats.expert_misses > 0
    assert stats.expert_bytes_read > 0


# -- a text that outgrows its plan


def watched(model: PreTrainedModel) -> list[tuple[int, int]]:
    """After each pass from now on: bytes that the cache holds, bytes that the plan has for it.

    The room for activations is cut to that of a pass of one token: a tiny cache would fit into the rest of it.
    """
    seen: list[tuple[int, int]] = []
    engine = model.lamina.engine
    tight = dataclasses.replace(engine.plan.budget, activation_bytes=model.lamina._trace.activations(1))
    engine.revise(budget=tight)

    def look(_: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        held = sum(tensor.nbytes for tensor in _tensors_of(cache_of(kwargs) or cache_of(out)))
        seen.append((held, model.lamina.plan.budget.kv_cache_bytes))

    model.register_forward_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", TEN)
def test_a_cache_that_grows_is_counted(family: str, tmp_path: Path) -> None:
    """Whatever a version calls the cache of a call: the plan has room for what is in it, after every pass."""
    write_tiny(family, tmp_path)
    memory = minimum_of(tmp_path) + 50_000_000
    with (model := AutoModel.from_pretrained(str(tmp_path), memory=memory, device="cpu", context=8)).lamina:
        seen = watched(model)
        ids = input_ids(model.config, 5)
        model.generate(ids, max_new_tokens=CONTEXT, min_new_tokens=CONTEXT, do_sample=False, pad_token_id=0, draft=None)
    held, planned = zip(*seen, strict=True)
    assert held[-1] >= held[0] > 0
    assert all(in_it <= room for in_it, room in seen), (held, planned)
