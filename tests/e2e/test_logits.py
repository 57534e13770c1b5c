"""The logits of every token are part of what a pass takes: they are counted where a caller asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from helpers.families import tiny_config, write_tiny
from helpers.judge import minimum_of, plain_model
from lamina.hf.trace import LOSS

ROWS = 4
TOKENS = 64  # of each row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_tiny("llama", path)
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 90, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def counted(model: Any, *args: Any, **kwargs: Any) -> int:
    """Bytes that the plan keeps for activations and the cache after a pass."""
    with torch.no_grad():
        model(*args, **kwargs)
    budget = model.lamina.plan.budget
    return int(budget.activation_bytes + budget.kv_cache_bytes)


def test_logits_of_every_token_are_counted_where_they_are_asked_for(folder: Path, ids: torch.Tensor) -> None:
    vocabulary, last = tiny_config("llama").vocab_size * 4, {"logits_to_keep": 1}
    each: dict[str, int] = {}
    for name, kwargs in {
        "last": last,
        "two": {"logits_to_keep": 2},
        "tensor": {"logits_to_keep": torch.tensor([1, 5, 7])},
        "all": {},
        "loss": {"labels": ids},
    }.items():
        with lamina.AutoModel.from_pretrained(str(folder), memory="2GB", draft=None, context=8) as model:
            each[name] = counted(model, ids, **kwargs)
    assert each["two"] - each["last"] == ROWS * vocabulary
    assert each["tensor"] - each["last"] == ROWS * 2 * vocabulary
    assert each["all"] - each["last"] == ROWS * (TOKENS - 1) * vocabulary
    assert each["loss"] - each["all"] == ROWS * TOKENS * tiny_config("llama").vocab_size * LOSS


def test_the_model_under_the_head_gives_none(folder: Path, ids: torch.Tensor) -> None:
    with lamina.AutoModel.from_pretrained(str(folder), memory="2GB", draft=None, context=8) as model:
        last = counted(model, ids, logits_to_keep=1)
    with lamina.AutoModel.from_pretrained(str(folder), memory="2GB", draft=None, context=8) as model, torch.no_grad():
        model.model(ids)
        budget = model.lamina.plan.budget
        # the cache has room for half as much again each time that it outgrows the plan, here and there
        assert (
            budget.activation_bytes + budget.kv_cache_bytes == last - (ROWS - 1) * tiny_config("llama").vocab_size * 4
        )


def test_what_does_not_fit_is_refused_with_what_to_do(folder: Path, ids: torch.Tensor) -> None:
    many = ids.repeat(64, 1)
    least = minimum_of(folder, draft=None)
    with lamina.AutoModel.from_pretrained(str(folder), memory=least, draft=None, context=8) as model:
        with pytest.raises(lamina.BudgetError, match=r"of it are logits: logits_to_keep=1") as caught:
            model(many)
        enough = caught.value.minimum_bytes
    plain = plain_model(folder)
    with lamina.AutoModel.from_pretrained(str(folder), memory=enough, draft=None, context=8) as model, torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert model(many).logits.shape[:2] == many.shape
