"""A continuous batch keeps the budget, whatever the number and the lengths of its requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import lamina
from helpers.tiny import write_llama
from lamina import AutoModel, BudgetError
from lamina.hf import internals
from lamina.hf.decoding import batching
from lamina.hf.decoding.batching import PAGE, Need, Size, shorter, size_for
from lamina.hf.trace import Trace
from lamina.plan.schedule import Call
from lamina.tensors.padded_rows import BATCHED_SIZES, even_rows, pieces

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "batch_memory.py"
ROOM = 40_000_000  # beyond the least that the model needs: for caches, logits and a few weights
CONFIG = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama with the vocabulary of a large one, of 16 bits."""
    return write_llama(
        tmp_path_factory.mktemp("batch") / "model", dtype=torch.bfloat16, vocab_size=32_000, intermediate_size=160,
        num_hidden_layers=2, tie_word_embeddings=True,
    )  # fmt: skip


def _can_make_cgroups() -> bool:
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        at = root / f"lamina-test-{os.getpid()}"
        with suppress(OSError):
            at.mkdir()
            made = any((at / name).exists() for name in ("memory.limit_in_bytes", "memory.max"))
            at.rmdir()
            if made:
                return True
    return False


@pytest.fixture(scope="module")
def least(folder: Path) -> int:
    """The smallest budget of the model in a process of its own."""
    code = (
        "import sys\nfrom lamina import AutoModel, BudgetError\n"
        "try: AutoModel.from_pretrained(sys.argv[1], memory='1MB', context=2048)\n"
        "except BudgetError as error: print(error.minimum_bytes)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, folder], env=_environment(), capture_output=True, text=True)
    return int(told.stdout)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(lamina.__file__).parents[1])}


@pytest.mark.skipif(not _can_make_cgroups(), reason="no memory cgroup can be made here")
@pytest.mark.parametrize("way", ["generate_batch", "manager"])
def test_two_hundred_requests_in_a_cgroup_of_the_budget(way: str, folder: Path, least: int) -> None:
    budget = least + ROOM
    command = [sys.executable, BENCHMARK, folder, "--memory", str(budget), "--context", "2048", "--ways", way,
               "--new-tokens", "3", "--no-record"]  # fmt: skip
    run = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert run.stdout, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])["proofs"][0]
    assert said["failure"] is None, (said, run.stderr[-500:])
    assert said["cap_bytes"] == budget
    assert said["ended_well"] == 200, said["errors"]
    assert said["process_peak_bytes"] <= budget
    assert said["cgroup_peak_bytes"] <= budget


@pytest.fixture
def model(folder: Path, least: int) -> Iterator[Any]:
    with pytest.raises(BudgetError) as caught:
        AutoModel.from_pretrained(folder, memory="1MB", context=512)
    model = AutoModel.from_pretrained(folder, memory=caught.value.minimum_bytes + ROOM, context=512)
    yield model
    model.lamina.close()


def test_a_prompt_that_does_not_fit_fails_alone(model: Any) -> None:
    room = ContinuousBatchingConfig(page_size=32, num_blocks=10, max_batch_tokens=64)
    prompts = [[5] * 40, [6] * 500, [7] * 100]
    answers = list(model.generate_batch(prompts, CONFIG, continuous_batching_config=room).values())
    short, long, other = sorted(answers, key=lambda answer: answer.prompt_ids[0])[0], answers[1], answers[2]
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert len(short.generated_tokens) == len(other.generated_tokens) == 3
    assert "a prompt of 500 tokens does not fit" in long.error and "\n" not in long.error
    assert "320 tokens" in long.error


def test_an_answer_that_would_outgrow_the_cache_ends_where_it_is_full(model: Any) -> None:
    room = ContinuousBatchingConfig(page_size=32, num_blocks=3, max_batch_tokens=64)
    longer = GenerationConfig(max_new_tokens=200, do_sample=False, pad_token_id=0, eos_token_id=-1)
    with pytest.warns(lamina.FallbackWarning, match="ends after 36 new tokens in place of 200"):
        (answer,) = model.generate_batch([[5] * 60], longer, continuous_batching_config=room).values()
    assert answer.error is None and len(answer.generated_tokens) == 36


def test_too_large_a_batch_is_a_budget_error_with_what_is_enough(model: Any) -> None:
    room = ContinuousBatchingConfig(page_size=32, num_blocks=20_000)
    with pytest.raises(BudgetError, match="continuous batch") as caught:
        model.init_continuous_batching(CONFIG, room)
    budget = model.lamina.plan.budget
    need = batching.need_of(model, model.lamina.plan, (), model.lamina._trace)
    assert caught.value.minimum_bytes - budget.memory_bytes > 20_000 * 32 * need.token_bytes - 2 * ROOM


def test_one_request_at_a_time_where_no_more_fit_and_an_error_with_what_is_enough_below_that(folder: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        AutoModel.from_pretrained(folder, memory="1MB", context=512)
    model = AutoModel.from_pretrained(folder, memory=caught.value.minimum_bytes, context=512)
    with model.lamina:
        try:
            manager = model.init_continuous_batching(CONFIG)
        except BudgetError as error:
            enough = error.minimum_bytes
        else:
            enough = caught.value.minimum_bytes
            assert manager.continuous_batching_config.num_blocks * 32 >= 256
    assert caught.value.minimum_bytes <= enough <= caught.value.minimum_bytes + ROOM
    model = AutoModel.from_pretrained(folder, memory=enough, context=512)
    with model.lamina:
        answers = model.generate_batch([[5] * 200, [7] * 30], CONFIG).values()
    assert [len(answer.generated_tokens) for answer in answers] == [3, 3]


def test_a_batch_gives_its_room_back(model: Any) -> None:
    manager = model.init_continuous_batching(CONFIG)
    taken = model.lamina._batches.nbytes
    budget = model.lamina.plan.budget
    assert 0 < taken <= budget.kv_cache_bytes + budget.activation_bytes
    manager.start()
    manager.stop()
    assert model.lamina._batches.nbytes == 0


def _need(**more: Any) -> Need:
    activations = {16: 1000, 32: 2000, 64: 4000}
    traced = Trace(Call("", (), ()), {}, activation_bytes=activations)
    fields: dict[str, Any] = {"traced": traced, "token_bytes": 100.0, "read_bytes": 50, "score_bytes": 0,
                              "mask_bytes": 2, "readable": 1.0, "spare_tokens": 128, "logit_bytes": 10_000,
                              "logits_of_all": False, "shapes": 0}  # fmt: skip
    return Need(**(fields | more))


@pytest.mark.parametrize("room", [200_000, 400_000, 1_000_000, 10_000_000, 10**9])
@pytest.mark.parametrize("more", [{}, {"logits_of_all": True}, {"score_bytes": 40}, {"readable": 4.0}])
def test_a_size_fits_its_room(room: int, more: dict[str, Any]) -> None:
    need = _need(**more)
    size = size_for(need, room, 500)
    least = size_for(need, 0, 500)
    assert size.cache_tokens >= 512 and size.cache_tokens % PAGE == 0
    assert need.of(size) <= room or size == least == Size(512, 32, 1)
    assert size.requests <= size.batch_tokens


def test_a_shorter_cache_fits_or_is_no_use() -> None:
    need, size = _need(), Size(2048, 32, 1)
    room = need.of(size) - 50_000
    cut = shorter(need, size, room)
    assert cut is not None and need.of(cut) <= room and cut.cache_tokens < 2048
    assert shorter(need, size, 10_000) is None


def test_products_of_a_batch_have_few_sizes() -> None:
    for rows in range(1, 1025):
        found = pieces(rows)
        assert set(found) <= set(BATCHED_SIZES)
        assert sum(found[:-1]) < rows <= sum(found) <= max(rows * 4 / 3 + 1, 32 if rows > 16 else 2 * rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 65, 100, 130, 193, 255, 256, 257, 300, 511, 600])
def test_few_sizes_give_the_same_bits(rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(192, 96).bfloat16(), torch.randn(192).bfloat16(), torch.randn(rows, 96).bfloat16()
    plain = torch.nn.functional.linear(x, weight, bias)
    with even_rows(rows, torch.device("cpu"), batched=True):
        few = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(plain, few) and few.shape == plain.shape


def test_a_batch_says_which_attention_keeps_scores(model: Any) -> None:
    assert not internals.keeps_scores(model.config)
