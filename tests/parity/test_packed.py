"""Weights in panels, unpacked where they are used, are the weights: bit for bit, for every family.

The codec of these tests holds elements as they are, so the files are those of the plain model and every
difference is one of the way through panels: which rows are unpacked when, and into what. In bfloat16, whose products
do not depend on where in memory a weight lies, as those of float32 do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

import lamina.runtime.load
from helpers.families import FAMILIES, write_tiny
from helpers.judge import Judge, answers, assert_equal, judge, minimum_of, steady, streamed_model
from lamina.checkpoint import Checkpoint, open_checkpoint
from lamina.checkpoint.extent import Encoding, TensorEntry
from lamina.codec import Codec, codec, register
from lamina.plan.schedule import Convert
from lamina.tensors import packed

MORE_BUDGETS = "llama gemma3_text mixtral qwen3_moe gpt_oss deepseek_v3 mamba2 falcon dbrx llama4_text".split()
SAMPLE = {*MORE_BUDGETS, *FAMILIES[::3]}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
WIDEST_PANEL = 4


class Raw(Codec):
    """Elements as they are; one codec a dtype."""

    def __init__(self, stored: str) -> None:
        self.name, self.stored = f"raw.{stored}", DTYPES[stored]

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        assert panels.is_contiguous() and out.shape == (rows, columns)
        out.copy_(panels.reshape(-1).clone().view(self.stored).view(rows, columns))


def in_panels(entry: TensorEntry) -> TensorEntry:
    if len(entry.shape) < 2 or entry.dtype not in DTYPES or not entry.extent.length:
        return entry
    rows = math.gcd(entry.shape[-2], WIDEST_PANEL)
    nbytes = rows * entry.shape[-1] * DTYPES[entry.dtype].itemsize
    return dataclasses.replace(entry, encoding=Encoding(f"raw.{entry.dtype}", rows, nbytes))


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


@pytest.fixture(autouse=True)
def everything_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_codecs", dict(codec._codecs))
    for stored in DTYPES:
        register(Raw(stored))

    def opened(*args: object, **kwargs: object) -> Checkpoint:
        checkpoint = open_checkpoint(*args, **kwargs)  # type: ignore[arg-type]
        tensors = {name: in_panels(entry) for name, entry in checkpoint.tensors.items()}
        return dataclasses.replace(checkpoint, tensors=tensors)

    monkeypatch.setattr(lamina.runtime.load, "open_checkpoint", opened)


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    family, dtype = request.param
    folder = tmp_path_factory.mktemp(family)
    write_tiny(family, folder, dtype=dtype)
    return judge(folder, family)


def unless_sampled(family: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if family in SAMPLE else (pytest.mark.slow,)


def cases(families: list[str] | tuple[str, ...], dtype: torch.dtype) -> list[object]:
    return [pytest.param((family, dtype), id=family, marks=unless_sampled(family)) for family in families]


@pytest.mark.parametrize("said", cases(FAMILIES, torch.bfloat16), indirect=True)
def test_at_the_minimum(said: Judge) -> None:
    model = streamed_model(said.folder, minimum_of(said.folder))
    with model.lamina:
        weights = model.lamina._engine.schedule.values()
        assert any(weight.convert is Convert.UNPACK for weight in weights)
        logits, tokens = answers(model, said.ids)
    assert torch.equal(tokens, said.tokens)
    assert torch.equal(logits, said.logits), f"off by {(logits - said.logits).abs().max().item():.3g}"


@pytest.mark.parametrize("budget", ["half", "resident"])
@pytest.mark.parametrize("said", cases(MORE_BUDGETS, torch.bfloat16), indirect=True)
def test_with_more_memory(said: Judge, budget: str) -> None:
    assert_equal(said, said.budget(budget) + packed.BLOCK)
