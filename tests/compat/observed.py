"""What one version of transformers makes of a tiny family: its file, its plan, its drafts, the second ways it takes.

Nothing of it depends on how quick the machine is or on what the process did before: `parity.judge.steady` fixes the
overhead, and `Always` drafts as much as may be.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from helpers.always import Always
from helpers.families import input_ids, write_tiny
from helpers.judge import minimum_of, steady, streamed_model
from helpers.wavering import Wavering
from lamina.speculative.decoder import MOST

VERSION = ".".join(transformers.__version__.split(".")[:2])
PROMPT = 6  # tokens, said three times: there is something to look up from the first cycle on
NEW_TOKENS = 24


@dataclass(frozen=True)
class Figures:
    """What is the same on every version.

    Attributes:
        tensors: of the checkpoint that `families.write_tiny` wrote: a hash of their names, shapes and dtypes.
        weights: of their values: a weighted sum. No hash, for torch's random numbers differ in their last bit from one
            kind of processor to the next.
        minimum_memory_bytes: for `parity.judge.CONTEXT` tokens with a lookup draft. The four after it are of the plan
            for that much and half of the checkpoint.
        lookup: passes, drafted tokens and accepted tokens of a greedy answer of `NEW_TOKENS` tokens with that draft;
            `oracle` the same with one that is right at four tokens of five.
    """

    tensors: str
    weights: float
    minimum_memory_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    resident_bytes: int
    bytes_read_per_pass: int
    lookup: list[int]
    oracle: list[int]


@dataclass(frozen=True)
class Observed:
    """A family's figures, and the second ways that it takes, but for those that are this machine's doing."""

    figures: Figures
    fallbacks: tuple[str, ...]


@functools.cache
def observed(family: str) -> Observed:
    """A family, written, planned, loaded and asked once, whatever is tested of it."""
    with tempfile.TemporaryDirectory() as name, steady():
        folder = Path(name)
        write_tiny(family, folder)
        tensors = load_file(folder / "model.safetensors")
        half = sum(tensor.nbytes for tensor in tensors.values()) // 2
        model = streamed_model(folder, minimum_of(folder, draft="lookup") + half, draft="lookup")
        with model.lamina:
            plan = model.lamina.plan
            figures = Figures(
                *_fingerprint(tensors),
                plan.minimum_memory_bytes,
                plan.budget.activation_bytes,
                plan.budget.kv_cache_bytes,
                plan.resident_bytes,
                plan.bytes_read_per_pass,
                *_drafted(model),
            )
            machine = set(model.lamina.engine.readers.fallbacks)
            return Observed(figures, tuple(each for each in model.lamina.stats.fallbacks if each not in machine))


def _fingerprint(tensors: Mapping[str, torch.Tensor]) -> tuple[str, float]:
    """`tensors` and `weights` of the figures."""
    named = sorted(tensors.items())
    text = "".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n" for name, tensor in named)
    total = 0.0
    for i, (_, tensor) in enumerate(named, 1):
        places = torch.linspace(1, 2, tensor.numel(), dtype=torch.float64)
        total += i * float(tensor.double().flatten() @ places)
    return hashlib.sha256(text.encode()).hexdigest()[:12], round(total, 4)


def _drafted(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """`lookup` and `oracle` of the figures."""
    ids = input_ids(model.config, PROMPT).repeat(1, 3)
    answer = _answer(model, ids, None)
    decoder = model.lamina.decoder
    lookup, _ = decoder._draft("lookup", False)
    counts = []
    for name, draft in (("lookup", lookup), ("oracle", Wavering(answer[0].tolist()))):
        decoder._drafts[name] = draft, Always(MOST, None, 0.0, must=True)
        before = _counts(model)
        assert torch.equal(_answer(model, ids, name), answer), f"{name} changes the answer"
        counts.append([now - then for now, then in zip(_counts(model), before, strict=True)])
    first, second = counts
    return first, second


def _answer(model: PreTrainedModel, ids: torch.Tensor, draft: str | None) -> torch.Tensor:
    asked: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    answer: torch.Tensor = model.generate(ids, pad_token_id=0, draft=draft, **asked)
    return answer


def _counts(model: PreTrainedModel) -> tuple[int, int, int]:
    stats = model.lamina.stats
    return stats.passes, stats.drafted_tokens, stats.accepted_tokens
