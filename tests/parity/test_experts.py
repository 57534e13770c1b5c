"""Experts read on demand: the same answers as plain transformers, from no more bytes than the routed experts have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from helpers.families import input_ids, write_tiny
from helpers.judge import BUDGETS, Judge, judge, plain_model, reads_on_demand, steady, streamed_model, traced_once
from lamina import AutoModel, BudgetError
from lamina.plan.layout import ALIGNMENT
from lamina.stream.expert_cache import Idle

FAMILIES = """
    mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 glm4_moe gpt_oss ernie4_5_moe dots1 hunyuan_v1_moe
    granitemoe phimoe jamba minimax minimax_m2 flex_olmo qwen3_next llama4_text dbrx longcat_flash
""".split()
# transformers' own continuous batching has no cache for these, or fails in their masks
NO_BATCHES = {"jamba", "llama4_text", "minimax", "qwen3_next"}
Said = tuple[str, Judge, PreTrainedModel]
PAD = 0


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():  # a family is loaded again and again
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, folder, dtype=torch.float32)
    return request.param, judge(folder, request.param), plain_model(folder, request.param)


def padded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left as `generate` wants them."""
    ids = input_ids(model.config, length=9, batch=3, seed=5)
    mask = torch.ones_like(ids)
    for row, short in enumerate((0, 3, 6)):
        ids[row, :short], mask[row, :short] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def answers(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    batch = padded(model)
    with torch.no_grad():
        logits = model(**batch).logits
    return logits, model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=PAD)


def shared_passes(model: PreTrainedModel) -> dict[tuple[int, ...], list[int]]:
    """What `generate_batch` answers, by prompt."""
    prompts = [input_ids(model.config, length=length, seed=length)[0].tolist() for length in (4, 3, 7)]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=-1)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    got = model.generate_batch(prompts, config, continuous_batching_config=room)
    return {tuple(result.prompt_ids): result.generated_tokens for result in got.values()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_batch_with_padding(said: Said, budget: str) -> None:
    _, verdict, plain = said
    with reads_on_demand() as demanded:
        model = streamed_model(verdict.folder, verdict.budget(budget))
        with model.lamina:
            logits, tokens = answers(model)
            routed = model.lamina.stats.experts_routed
    wanted_logits, wanted_tokens = answers(plain)
    assert torch.equal(logits, wanted_logits)
    assert torch.equal(tokens, wanted_tokens)
    assert not demanded
    assert bool(model.lamina.plan.expert_slots) is (budget != "resident")
    assert bool(routed) is (budget != "resident")


@pytest.mark.parametrize("budget", BUDGETS)
def test_continuous_batching(said: Said, budget: str) -> None:
    family, verdict, plain = said
    if family in NO_BATCHES:
        pytest.skip("transformers cannot batch this family continuously")
    model = streamed_model(verdict.folder, verdict.budget(budget) + 50_000_000 * (budget == "minimum"))
    with model.lamina:
        got = shared_passes(model)
    assert got == shared_passes(plain)
    assert len(got) == 3


# -- bytes


class Routes:
    """The experts that plain transformers sends tokens to, pass by pass: module -> ids."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.passes: list[dict[str, set[int]]] = []
        for name, module in model.named_modules():
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
                module.register_forward_pre_hook(self._seeing(name))
        model.register_forward_pre_hook(lambda *_: self.passes.append({}))

    def _seeing(self, name: str) -> Any:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            self.passes[-1][name] = set(args[1].flatten().tolist())

        return see


def expert_bytes(folder: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """Bytes and tensors of each expert by (layer, expert), as the files' headers say."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                match = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.", name)
                if match:
                    key = int(match[1]), int(match[2])
                    nbytes, count = found.get(key, (0, 0))
                    tensor = shard.get_tensor(name)
                    found[key] = nbytes + tensor.numel() * tensor.element_size(), count + 1
    return found


def layer_of(module: str) -> int:
    match = re.search(r"layers\.(\d+)\.", module)
    assert match
    return int(match[1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_decode_step_with_a_cold_cache_reads_exactly_the_routed_experts(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, family)
    plain = plain_model(tmp_path, family)
    routes = Routes(plain)
    token = verdict.ids[:, :1]
    with torch.no_grad():
        plain(token)
    (routed,) = routes.passes
    sizes = expert_bytes(tmp_path)
    wanted = [sizes[layer_of(module), expert] for module, experts in routed.items() for expert in experts]
    exact, slack = sum(n for n, _ in wanted), ALIGNMENT * sum(count for _, count in wanted)
    model = streamed_model(tmp_path, verdict.budget("half"))
    with model.lamina, torch.no_grad():
        plan, readers = model.lamina.plan, model.lamina._engine.readers
        assert plan.experts and not plan.steps and not plan.gathered & {"lm_head.weight"}
        table = next(iter(model.lamina._engine.weights.schedule.weights[name] for name in plan.gathered))
        row = table.stored_nbytes // table.rows
        before = readers.bytes_read
        model(token)
        read = readers.bytes_read - before - row
        stats = model.lamina.stats
    assert exact <= read <= exact + slack
    assert stats.expert_misses == stats.experts_routed == len(wanted)
    assert stats.expert_bytes_read == read


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_pass_at_the_minimum_reads_what_streams_and_the_experts_that_miss(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, family)
    plain = plain_model(tmp_path, family)
    routes = Routes(plain)
    model = streamed_model(tmp_path, verdict.minimum)
    with model.lamina, torch.no_grad():
        engine, plan = model.lamina._engine, model.lamina.plan
        assert plan.expert_slots == 1 and plan.steps
        row = sum(w.stored_nbytes // w.rows for w in map(engine.weights.schedule.weights.get, plan.gathered) if w)
        model(verdict.ids)
        for token in verdict.ids[0].tolist():
            engine.readers.settle()
            before = engine.readers.bytes_read, model.lamina.stats
            model(torch.tensor([[token]]))
            plain(torch.tensor([[token]]))
            engine.readers.settle()
            read, stats = engine.readers.bytes_read - before[0], model.lamina.stats
            experts = stats.expert_bytes_read - before[1].expert_bytes_read
            assert read == plan.bytes_streamed_per_pass + experts + row
            routed = sum(len(ids) for ids in routes.passes[-1].values())
            assert stats.experts_routed - before[1].experts_routed == routed
            assert stats.expert_misses - before[1].expert_misses >= routed - 1


def test_tokens_of_each_expert_are_those_that_were_routed(tmp_path: Path) -> None:
    write_tiny("qwen3_moe", tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, "qwen3_moe")
    plain = plain_model(tmp_path, "qwen3_moe")
    counted: dict[str, torch.Tensor] = {}
    for name, module in plain.named_modules():
        if name.endswith(".experts"):

            def see(_: Any, args: tuple[Any, ...], name: str = name) -> None:
                counted[name] = counted.get(name, 0) + torch.bincount(args[1].flatten(), minlength=4)

            module.register_forward_pre_hook(see)
    model = streamed_model(tmp_path, verdict.budget("half"))
    with model.lamina, torch.no_grad():
        for each in (model, plain):
            each(verdict.ids)
        stats = model.lamina.stats
    assert stats.expert_tokens == {name: tuple(tokens.tolist()) for name, tokens in counted.items()}
    assert stats.expert_hits + stats.expert_misses == stats.experts_routed
    assert stats.active_bytes_per_token < stats.model_bytes


# -- the cache


def test_more_memory_holds_more_experts_and_all_of_them_are_read_once(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, "mixtral")
    seen = []
    for budget in range(verdict.minimum, verdict.minimum + verdict.nbytes, verdict.nbytes // 9):
        model = streamed_model(tmp_path, budget)
        with model.lamina, torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(verdict.ids).logits, verdict.logits)
            slots, stats, experts = model.lamina.plan.expert_slots, model.lamina.stats, model.lamina._engine.experts
            if experts is not None:
                assert len(experts._kept) <= slots
                seen.append((slots, stats.expert_misses))
    assert len(seen) > 5 and seen[0][0] == 1
    assert [slots for slots, _ in seen] == sorted(slots for slots, _ in seen)
    assert [misses for _, misses in seen] == sorted((misses for _, misses in seen), reverse=True)


@pytest.mark.parametrize("all_resident", [False, True])
def test_a_longer_context_takes_the_cache_s_memory_and_gives_the_same_answer(
    all_resident: bool, tmp_path: Path
) -> None:
    write_tiny("mixtral", tmp_path, dtype=torch.float32)
    plain = plain_model(tmp_path, "mixtral")
    ids = input_ids(plain.config, length=300)
    memory = judge(tmp_path, "mixtral").budget("half") + (500_000 if all_resident else -100_000)
    model = AutoModel.from_pretrained(str(tmp_path), memory=memory, device="cpu", context=16)
    with model.lamina, torch.no_grad():
        before = model.lamina.plan
        assert torch.equal(model(ids[:, :8]).logits, plain(ids[:, :8]).logits)
        last = {"logits_to_keep": 8}  # those of all tokens are no less than the cache
        assert torch.equal(model(ids, **last).logits, plain(ids, **last).logits)
        after, engine = model.lamina.plan, model.lamina._engine
        assert after.budget.memory_bytes == before.budget.memory_bytes
        assert bool(before.experts) is not all_resident
        assert after.expert_slots < before.expert_slots or all_resident
        assert engine.experts is not None and len(engine.experts._areas) == after.expert_slots
        assert torch.equal(model(ids[:, :8]).logits, plain(ids[:, :8]).logits)


def test_one_byte_below_the_minimum_is_refused(tmp_path: Path) -> None:
    write_tiny("qwen3_moe", tmp_path, dtype=torch.float32)
    least = judge(tmp_path, "qwen3_moe").minimum
    with pytest.raises(BudgetError):
        streamed_model(tmp_path, least - 1)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_that_are_multiplied_at_once_stream_by_layer(implementation: str, tmp_path: Path) -> None:
    write_tiny("qwen3_moe", tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, "qwen3_moe", experts_implementation=implementation)
    with reads_on_demand() as demanded:
        model = streamed_model(tmp_path, verdict.minimum, experts_implementation=implementation)
        with model.lamina, torch.no_grad():
            assert torch.equal(model(verdict.ids).logits, verdict.logits)
    assert not demanded
    assert not model.lamina.plan.expert_slots
    parts = {part.weight for item in model.lamina.plan.items for part in item.parts}
    assert any("experts" in name for name in parts)


def test_an_interrupt_in_the_middle_leaves_the_cache_right(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, "mixtral")
    model = streamed_model(tmp_path, verdict.budget("half"))
    calls = itertools.count()

    def interrupt(*_: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    handle = model.get_submodule("model.layers.2.mlp.experts.act_fn").register_forward_pre_hook(interrupt)
    with model.lamina, torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model.generate(verdict.ids, max_new_tokens=3, do_sample=False)
        handle.remove()
        assert torch.equal(model(verdict.ids).logits, verdict.logits)


# -- prefetched


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "olmoe"])
def test_what_is_prefetched_changes_no_answer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Idle, "nbytes", 1 << 40)  # whatever the time
    write_tiny(family, tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, family)
    plain = plain_model(tmp_path, family)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, "eos_token_id": -1}
    wanted = plain.generate(verdict.ids, **options)
    prefetched = {}
    for prefetching in (True, False):
        model = streamed_model(tmp_path, verdict.budget("half"), prefetching=prefetching)
        with model.lamina:
            assert torch.equal(model.generate(verdict.ids, **options), wanted)
            stats = model.lamina.stats
            prefetched[prefetching] = stats.experts_prefetched
            assert stats.expert_hits + stats.experts_prefetched + stats.expert_misses == stats.experts_routed
    assert prefetched[True] > 0
    assert prefetched[False] == 0


def test_a_router_that_cannot_be_asked_early_is_not_asked_again(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path, dtype=torch.float32)
    verdict = judge(tmp_path, "mixtral")
    model = streamed_model(tmp_path, verdict.budget("half"))
    router = model.get_submodule("model.layers.1.mlp.gate")
    plain, asked = router.forward, []

    def forward(x: torch.Tensor) -> Any:
        early = router not in running
        asked.append(early)
        if early:
            raise TypeError("not with these")
        return plain(x)

    running: list[torch.nn.Module] = []
    router.forward = forward
    router.register_forward_pre_hook(lambda *_: running.append(router), prepend=True)
    router.register_forward_hook(lambda *_: running.clear(), always_call=True)
    with model.lamina, torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(verdict.ids).logits, verdict.logits)
    assert asked.count(True) == 1
