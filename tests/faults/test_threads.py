"""One model in many threads: every answer is the one that a single thread gets, and every thread comes to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.families import tiny_model, write_tiny
from helpers.judge import CONTEXT, minimum_of, streamed_model
from helpers.walker import watchdog
from lamina import AutoModel, BudgetError
from lamina.speculative.model_draft import CopyDraft

pytestmark = pytest.mark.usefixtures("steadily")

IDS = torch.tensor([[5, 99, 23, 77, 5, 99, 23, 77, 5, 99]])
NEW = 6


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog(300):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its copy in 4 bits beside it."""
    folder = tmp_path_factory.mktemp("threads") / "model"
    write_tiny("llama", folder, tie=False)
    AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft="self").lamina.close()
    return folder


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return tiny_model("llama", tie=False).generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def answer(model: PreTrainedModel, **asked: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **asked)


def together(*works: Callable[[], None]) -> None:
    """Run these at once; what one of them raises is raised here."""
    raised: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def mixed(model: PreTrainedModel, wanted: torch.Tensor, rounds: int) -> None:
    drafts = ("lookup", "self", None)

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            for turn in range(rounds):
                assert torch.equal(answer(model, draft=drafts[(number + turn) % 3]), wanted)

        return run

    together(*(work(number) for number in range(4)))


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_four_threads_with_mixed_drafts_come_to_their_end(folder: Path, wanted: torch.Tensor, rounds: int) -> None:
    with streamed_model(folder, minimum_of(folder, draft="self"), draft="self") as model:
        assert model.lamina.plan.streams
        mixed(model, wanted, rounds)


def test_a_draft_that_is_built_meanwhile_leaves_the_passes_of_others_alone(folder: Path, wanted: torch.Tensor) -> None:
    """Weights of a model that runs were written down like those of the one that is being built."""
    with streamed_model(folder, minimum_of(folder, draft="self"), draft=None) as model:
        mixed(model, wanted, 2)


def test_models_are_loaded_while_another_one_runs(folder: Path, wanted: torch.Tensor) -> None:
    least = minimum_of(folder, draft=None)
    loaded: list[PreTrainedModel] = []
    failed: list[bool] = []
    with streamed_model(folder, least, draft=None) as model:

        def load() -> None:
            try:
                loaded.append(streamed_model(folder, least, draft=None))
            except BaseException:
                failed.append(True)
                raise

        def run() -> None:
            while len(loaded) < 2 and not failed:
                assert torch.equal(answer(model), wanted)

        together(load, load, run)
    for other in loaded:
        with other:
            assert torch.equal(answer(other), wanted)


def test_a_draft_computes_in_its_turn(folder: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a pass of another thread each of torch's products would wait for a core that the other one has."""
    overlapped: list[bool] = []
    propose = CopyDraft.propose

    with streamed_model(folder, minimum_of(folder, draft="self"), draft="self") as model:
        lock = model.lamina.engine.lock._lock

        def watched(draft: CopyDraft, *args: Any) -> Any:
            def look() -> None:
                overlapped.append(lock.acquire(blocking=False))

            together(look)
            return propose(draft, *args)

        monkeypatch.setattr(CopyDraft, "propose", watched)
        assert torch.equal(answer(model, draft="self"), wanted)
    assert overlapped and not any(overlapped)


def test_a_pass_in_another_thread_and_in_asyncio(folder: Path, wanted: torch.Tensor) -> None:
    with streamed_model(folder, minimum_of(folder, draft=None), draft=None) as model:
        answers: list[torch.Tensor] = []
        together(lambda: answers.append(answer(model)))

        async def several() -> None:
            answers.extend(await asyncio.gather(*(asyncio.to_thread(answer, model) for _ in range(3))))

        asyncio.run(several())
        assert len(answers) == 4 and all(torch.equal(each, wanted) for each in answers)
        stats = model.lamina.stats
        assert (stats.passes, stats.new_tokens) == (4 * NEW, 4 * NEW)


def test_weights_that_are_read_while_a_pass_runs_are_whole(folder: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    """A weight that a pass has bound lies in memory that the next unit is read into."""
    plain = tiny_model("llama", tie=False).state_dict()
    with streamed_model(folder, minimum_of(folder, draft=None), draft=None) as model:
        inside, go_on = threading.Event(), threading.Event()
        unit = next(item for item in model.lamina.plan.items if not item.block)

        def stop(*_: object) -> None:
            assert type(dict(model.named_parameters())[unit.parts[0].weight]) is torch.Tensor, "it is not bound"
            inside.set()
            assert go_on.wait(60)

        stopped = model.get_submodule(unit.module).register_forward_pre_hook(stop)
        found: list[dict[str, torch.Tensor]] = []

        def look() -> None:
            assert inside.wait(60)
            threading.Timer(0.2, go_on.set).start()
            found.append(model.state_dict())
            model.save_pretrained(tmp_path)

        together(look, lambda: torch.equal(answer(model), wanted) or pytest.fail("another answer"))
        stopped.remove()
        for name, tensor in plain.items():
            assert torch.equal(found[0][name].clone(), tensor), name
    again = AutoModel.from_pretrained(str(tmp_path), device="cpu", context=CONTEXT, draft=None)
    with again:
        assert torch.equal(answer(again), wanted)


def test_no_room_for_a_draft_in_one_thread_is_no_matter_of_the_others(folder: Path, wanted: torch.Tensor) -> None:
    with streamed_model(folder, minimum_of(folder, draft=None), draft=None) as model:

        def refused() -> None:
            with pytest.raises(BudgetError):
                answer(model, draft="self")

        def run() -> None:
            for _ in range(3):
                assert torch.equal(answer(model), wanted)

        together(refused, run, run)
