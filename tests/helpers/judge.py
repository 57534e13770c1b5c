"""Plain transformers, the judge of the parity tests, and what is asked of both sides.

Equal means bit for bit: both run the same kernels on the same values, so there is nothing to tolerate.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from helpers.families import MOE, input_ids
from lamina import AutoModel, BudgetError
from lamina.hf.trace import Trace
from lamina.plan import layout
from lamina.runtime import budget, load
from lamina.weights.materialize import Materializer

CONTEXT = 64  # tokens to make room for: the tests need far fewer
NEW_TOKENS = 6
BUDGETS = ("minimum", "half", "resident")


@dataclass(frozen=True)
class Judge:
    """What plain transformers says about a checkpoint.

    Attributes:
        ids: the prompt, of shape (1, tokens).
        logits: of the prompt.
        tokens: prompt and greedy answer.
        nbytes: of the weights.
        minimum: the smallest budget that Lamina asks for.
    """

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    nbytes: int
    minimum: int

    def budget(self, name: str) -> int:
        """Bytes of one of `BUDGETS`."""
        extra = {"minimum": 0, "half": self.nbytes // 2, "resident": 10 * self.nbytes + 200_000_000}
        return self.minimum + extra[name]


@contextmanager
def steady() -> Iterator[None]:
    """What the parity tests run under.

    One thread, for tiny models lose time with more; transformers without its reports; an overhead that does not
    depend on what ran before; and holes in a file skipped however short, else the norms of a tiny model bring
    all of it into memory.
    """
    threads, level = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()  # each load collects garbage: what is imported by now is none
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "GAP", 0)
            patch.setattr(budget, "already_held", lambda: 0)
            yield
    finally:
        gc.unfreeze()
        logging.enable_progress_bar()
        logging.set_verbosity(level)
        torch.set_num_threads(threads)


@contextmanager
def traced_once() -> Iterator[None]:
    """Within it a model of the same class, config and dtype is traced once, however often it is loaded."""
    kept: dict[object, Trace] = {}
    trace = load.trace

    def once(model: PreTrainedModel) -> Trace:
        ways = [getattr(model.config, f"_{what}_implementation", None) for what in ("attn", "experts")]
        key = type(model), model.config.to_json_string(use_diff=False), model.dtype, *ways
        if key not in kept:
            kept[key] = trace(model)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "trace", once)
        yield


def plain_model(folder: Path, family: str = "", **options: Any) -> PreTrainedModel:
    """The checkpoint in plain transformers, with the expert kernels that Lamina uses."""
    if family in MOE:
        options.setdefault("experts_implementation", "eager")
    options.setdefault("dtype", "auto")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def minimum_of(folder: Path, **options: Any) -> int:
    """The smallest budget for a checkpoint, as the error for one that is too small states it."""
    with pytest.raises(BudgetError) as caught:
        AutoModel.from_pretrained(str(folder), memory=1, device="cpu", context=CONTEXT, **options)
    return caught.value.minimum_bytes


def judge(folder: Path, family: str = "", **options: Any) -> Judge:
    """Plain transformers' logits and greedy tokens for a checkpoint."""
    plain = plain_model(folder, family, **options)
    ids = input_ids(plain.config)
    logits, tokens = answers(plain, ids)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in plain.parameters())
    return Judge(folder, ids, logits, tokens, nbytes, minimum_of(folder, **options))


def answers(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt, and the prompt with a greedy answer."""
    with torch.no_grad():
        logits = model(ids).logits
    return logits, model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def streamed_model(folder: Path, memory: int, **options: Any) -> PreTrainedModel:
    """The checkpoint in Lamina, on the processor."""
    return AutoModel.from_pretrained(str(folder), memory=memory, device="cpu", context=CONTEXT, **options)


@contextmanager
def reads_on_demand() -> Iterator[list[str]]:
    """The names of the weights that were not there when they were needed, as they come."""
    names: list[str] = []
    read = Materializer.read

    def noted(materializer: Materializer, name: str) -> torch.Tensor:
        names.append(name)
        return read(materializer, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Materializer, "read", noted)
        yield names


def assert_equal(judge: Judge, memory: int, *, on_demand: bool = False, **options: Any) -> PreTrainedModel:
    """Lamina with this much memory says what the judge says, bit for bit, and reads nothing out of turn.

    Args:
        on_demand: something is out of turn, and is read all the same.
    """
    with reads_on_demand() as demanded:
        model = streamed_model(judge.folder, memory, **options)
        with model.lamina:
            logits, tokens = answers(model, judge.ids)
    assert logits.dtype == judge.logits.dtype
    assert torch.equal(logits, judge.logits), f"off by {(logits - judge.logits).abs().max().item():.3g}"
    assert torch.equal(tokens, judge.tokens)
    assert model.lamina.plan.traced
    assert bool(demanded) is on_demand, set(demanded)
    return model
