"""Models on the simulated accelerator, and their judge: plain transformers on the same device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.families import input_ids
from helpers.judge import CONTEXT, plain_model
from lamina import AutoModel, BudgetError
from simulated.backend import Accelerator

NEW_TOKENS = 3
# Of the largest logit. Kernels of the processor may choose their order of summation by a weight's address, and that is
# another one in a slot; wrong bytes are off by all of it.
TOLERANCE = 1e-5
Answer = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Minimum:
    """The smallest budgets of a checkpoint, in bytes."""

    memory: int
    device_memory: int


def load(folder: Path, accelerator: Accelerator, **options: Any) -> PreTrainedModel:
    """The checkpoint in Lamina; the attention that torch has kernels of its own for knows no foreign device."""
    options = {"draft": None, "attn_implementation": "eager", "context": CONTEXT} | options
    return AutoModel.from_pretrained(str(folder), device=accelerator.device, **options)


def minimum(folder: Path, accelerator: Accelerator, **options: Any) -> Minimum:
    """As the errors for budgets that are too small state them: of the device, and then of the host beside it."""
    with pytest.raises(BudgetError) as caught:
        load(folder, accelerator, memory="10GB", device_memory=1, **options)
    device_memory = caught.value.minimum_bytes
    with pytest.raises(BudgetError) as caught:
        load(folder, accelerator, memory=1, device_memory=device_memory, **options)
    return Minimum(caught.value.minimum_bytes, device_memory)


def said(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Answer:
    """Logits of a prompt, and the prompt with a greedy answer; both on the host."""
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    return logits.cpu(), tokens.cpu()


def judged(folder: Path, accelerator: Accelerator, family: str = "") -> tuple[torch.Tensor, Answer]:
    """A prompt, on the device, and what plain transformers says to it there."""
    plain = plain_model(folder, family, attn_implementation="eager").to(accelerator.device)
    ids = input_ids(plain.config).to(accelerator.device)
    return ids, said(plain, ids)


def assert_same(got: Answer, wanted: Answer) -> None:
    """The same tokens, and logits that differ in no more than the last bits."""
    off = (got[0].float() - wanted[0].float()).abs().max().item()
    assert off <= TOLERANCE * wanted[0].abs().max().item(), f"off by {off:.3g}"
    assert torch.equal(got[1], wanted[1])
