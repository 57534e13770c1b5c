"""What models on the simulated accelerator go through: experts, stores, drafts, other plans, ends. Nothing is left.

The `accelerator` fixture counts what is left after each test: pins, queued work, bytes, and copies that came too late.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.families import write_tiny
from helpers.judge import steady, traced_once
from helpers.tiny import write_llama
from lamina import ClosedError, UnsupportedError
from simulated.backend import Accelerator, Register
from simulated.loading import Answer, Minimum, assert_same, judged, load, minimum, said

LATE = [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]  # copies, computations, both


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():
        yield


@dataclasses.dataclass
class Scene:
    """A checkpoint with its judge's word and its smallest budgets."""

    folder: Path
    accelerator: Accelerator
    register: Register
    ids: torch.Tensor
    wanted: Answer
    least: Minimum

    def load(self, *, memory: int = 0, device_memory: int = 0, **options: Any) -> PreTrainedModel:
        """The model in Lamina, with so many bytes more than the least."""
        memory, device_memory = self.least.memory + memory, self.least.device_memory + device_memory
        return load(self.folder, self.accelerator, memory=memory, device_memory=device_memory, **options)

    def check(self, model: PreTrainedModel, **options: Any) -> None:
        assert_same(said(model, self.ids.to(self.accelerator.device), **options), self.wanted)


def scene(folder: Path, accelerator: Accelerator, register: Register, family: str = "") -> Scene:
    if family:
        write_tiny(family, folder)
    else:
        write_llama(folder, spread=0.2)
    accelerator.schedule(1.0, 1.0)
    ids, wanted = judged(folder, accelerator, family)
    least = minimum(folder, accelerator)
    accelerator.driver.reset_counts()
    accelerator.schedule()
    return Scene(folder, accelerator, register, ids.cpu(), wanted, least)


@pytest.fixture
def llama(tmp_path: Path, accelerator: Accelerator, register: Register) -> Scene:
    return scene(tmp_path / "llama", accelerator, register)


@pytest.mark.parametrize("late", LATE)
def test_a_closed_model_has_nothing_pinned_and_nothing_under_way(llama: Scene, late: tuple[float, float]) -> None:
    llama.accelerator.schedule(*late)
    model = llama.load()
    llama.check(model)
    assert llama.accelerator.pins
    model.lamina.close()
    assert not llama.accelerator.pins
    assert not llama.accelerator.pending_copies
    with pytest.raises(ClosedError):
        llama.check(model)


def test_a_collected_model_writes_into_nobody_elses_memory(llama: Scene) -> None:
    """It was not closed, and copies were under way."""
    model = llama.load()
    llama.check(model)
    del model
    gc.collect()
    others = [torch.zeros(n, dtype=torch.uint8, device=llama.accelerator.device) for n in [1 << 12, 1 << 16] * 8]
    llama.accelerator.finish()
    assert all(not other.cpu().any() for other in others)
    assert llama.accelerator.counts["strays"] == 0


@pytest.mark.parametrize("late", LATE)
def test_another_plan_pins_its_own_ring(llama: Scene, late: tuple[float, float]) -> None:
    llama.accelerator.schedule(*late)
    model = llama.load(device_memory=90_000)
    with model.lamina as handle:
        for _ in range(3):
            llama.check(model)
            handle.engine.replan(handle.plan.budget)
        llama.check(model)
    assert len(llama.register.codes) > 1 and set(llama.register.codes) == {0}


@pytest.mark.parametrize("late", LATE)
def test_what_host_memory_holds_is_pinned_as_well(llama: Scene, late: tuple[float, float]) -> None:
    llama.accelerator.schedule(*late)
    model = llama.load(memory=1 << 30)
    with model.lamina as handle:
        assert any(item.cached for item in handle.plan.items)
        llama.check(model)
        handle.engine.replan(handle.plan.budget)
        llama.check(model)
    assert llama.accelerator.counts["pinned_copies"] > 0
    assert llama.accelerator.counts["pageable_copies"] == 0


@pytest.mark.parametrize("late", LATE)
def test_a_pass_that_breaks_off_is_followed_by_a_whole_one(llama: Scene, late: tuple[float, float]) -> None:
    llama.accelerator.schedule(*late)
    model = llama.load(memory=100_000)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with model.lamina:
        for layer in (1, 3):
            handle = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(llama.ids.to(llama.accelerator.device))
            handle.remove()
            llama.check(model)


def test_a_driver_that_refuses_to_pin_costs_speed_alone(llama: Scene) -> None:
    llama.register.refuse = 2
    with llama.load().lamina as handle:
        llama.check(handle.model)
    assert llama.accelerator.counts["pageable_copies"] > 0


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_in_slots(
    family: str, late: tuple[float, float], tmp_path: Path, accelerator: Accelerator, register: Register
) -> None:
    mixture = scene(tmp_path, accelerator, register, family)
    accelerator.schedule(*late)
    for more in (0, 60_000):
        model = mixture.load(memory=2 * more, device_memory=more)
        with model.lamina as handle:
            assert handle.plan.experts
            mixture.check(model)
            mixture.check(model)
    assert set(register.codes) == {0}


@pytest.mark.parametrize("compression", ["8bit", "4bit", "lossless"])
def test_stores(compression: str, tmp_path: Path, accelerator: Accelerator, register: Register) -> None:
    folder = write_llama(
        tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=8, spread=0.1, dtype=torch.bfloat16
    )
    accelerator.schedule(1.0, 1.0)
    ids = torch.tensor([[5, 99, 23, 77]], device=accelerator.device)
    model = load(folder, accelerator, memory="4GB", device_memory="1GB", compression=compression)
    with model.lamina:
        assert not model.lamina.plan.streams
        wanted = said(model, ids)
    least = minimum(folder, accelerator, compression=compression)
    for late in LATE[-1:]:
        accelerator.schedule(*late)
        budgets = {"memory": least.memory, "device_memory": least.device_memory}
        model = load(folder, accelerator, compression=compression, **budgets)
        with model.lamina:
            assert model.lamina.plan.streams
            assert_same(said(model, ids), wanted)


@pytest.mark.parametrize("draft", ["lookup", "self"])
def test_drafts(draft: str, llama: Scene) -> None:
    for late in LATE:
        llama.accelerator.schedule(*late)
        with llama.load(memory=1 << 28, device_memory=1 << 24, draft=draft, exact=False).lamina as handle:
            ids = llama.ids.to(llama.accelerator.device)
            tokens = handle.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert torch.equal(tokens.cpu(), llama.wanted[1])


@pytest.mark.parametrize("late", LATE)
def test_two_models_by_turns(llama: Scene, tmp_path: Path, late: tuple[float, float]) -> None:
    other = scene(tmp_path / "other", llama.accelerator, llama.register, "gpt2")
    llama.accelerator.schedule(*late)
    first, second = llama.load(), other.load()
    for _ in range(2):
        llama.check(first)
        other.check(second)
    first.lamina.close()
    del first
    other.check(second)
    second.lamina.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_ends_and_its_parent_goes_on(
    llama: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    with llama.load().lamina as handle:
        model = handle.model
        llama.check(model)
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(60)
            try:
                model(torch.tensor([[5, 6]]))
            except UnsupportedError:  # and nothing else
                handle.close()
                del model, handle
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        llama.check(model)
    assert "Exception" not in capfd.readouterr().err
