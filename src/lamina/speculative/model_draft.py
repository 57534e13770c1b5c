"""Drafts that are models: a small one with a cache of its own, and a copy of the target in few bits."""

from __future__ import annotations

from typing import Any

import torch

from lamina.hf import internals
from lamina.hf.names import DynamicCache
from lamina.speculative.draft import GoOn, Pick, Proposal, shared
from lamina.tensors.ids import vocabulary_rows


def _chain(model: Any, cache: Any, ids: torch.Tensor, most: int, go_on: GoOn, pick: Pick) -> Proposal:
    """Tokens one by one, beginning after `ids`, whose tokens the cache does not hold yet."""
    proposal = Proposal()
    for position in range(most):
        token, confidence = pick(position, _pass(model, cache, ids)[0, -1])
        proposal.tokens.append(token)
        proposal.confidence.append(confidence)
        if not go_on(confidence):
            break
        ids = ids.new_tensor([[token]])
    return proposal


def _pass(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a pass over tokens that follow those in the cache, of the last one at least."""
    past = internals.cached_tokens(cache)
    own: dict[str, Any] = {
        "position_ids": torch.arange(past, past + ids.shape[1], device=ids.device)[None],
        "logits_to_keep": 1,
    }
    own[internals.cache_argument(model) or internals.CACHE] = cache
    taken = internals.arguments_of(model)
    logits: torch.Tensor = model(input_ids=ids, use_cache=True, **{key: own[key] for key in own if key in taken}).logits
    return logits


class CopyDraft:
    """A copy of the target with smaller weights, on the target's own cache: it needs no pass over the prompt.

    What it adds to the cache is taken off again before the target verifies. (SubSpec: Wang et al., "Speculate Deep and
    Accurate: Lossless and Training-Free Acceleration for Offloaded LLMs via Substitute Speculative Decoding", 2025.)

    Args:
        model: the copy, all of it in memory.
    """

    name = "self"

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None

    def begin(self, prompt: list[int], cache: Any) -> str | None:
        """See `Draft`."""
        self._cache = cache
        if internals.convolves(cache):
            return "layers of this family look back through a convolution, where a copy cannot go ahead"
        return None

    @torch.no_grad()
    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        """See `Draft`."""
        before = internals.cached_tokens(self._cache)
        ids = torch.tensor([text[-1:]], device=self.model.device)
        try:
            return _chain(self.model, self._cache, ids, most, go_on, pick)
        finally:
            if (added := internals.cached_tokens(self._cache) - before) > 0:
                internals.crop(self._cache, added)


class ModelDraft:
    """Another model with the same tokens, all of it in memory.

    Args:
        name: as it was asked for.
        model: a causal language model.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        self._cache: Any = None
        self._held: list[int] = []  # tokens that its cache holds

    @torch.no_grad()
    def begin(self, prompt: list[int], cache: Any) -> str | None:
        """See `Draft`."""
        why = f"the draft {self.name} keeps a state that cannot forget what was not accepted"
        if internals.is_stateful(self.model):
            return why
        if (unknown := self._unknown(prompt)) is not None:
            return f"the draft {self.name} has no token {unknown}, which the text has"
        self._cache = DynamicCache(config=self.model.config)
        self._held = list(prompt)
        _pass(self.model, self._cache, torch.tensor([prompt], device=self.model.device))
        if not internals.can_crop(self._cache):  # known once it was used
            return why
        internals.record_past(self._cache)
        return None

    @torch.no_grad()
    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        """See `Draft`."""
        same = shared(self._held, text[:-1])
        if self._unknown(text[same:]) is not None:
            return Proposal()
        internals.crop(self._cache, len(self._held) - same)
        self._held = text[:-1]
        ids = torch.tensor([text[same:]], device=self.model.device)
        proposal = _chain(self.model, self._cache, ids, most, go_on, pick)
        self._held = [*text, *proposal.tokens[:-1]]
        return proposal

    def _unknown(self, tokens: list[int]) -> int | None:
        """One of these tokens that it has no row for: tables are padded to different numbers."""
        rows = vocabulary_rows(self.model)
        return None if rows is None else next((token for token in tokens if token >= rows), None)
