"""Continuous batching inside the budget: how large transformers' paged cache and its passes may be.

transformers sizes the cache of `generate_batch` by the memory of the machine and the passes by a default. A model with
a budget sizes them by what the plan leaves: the room for its context, and what no weight took. What a batched pass
takes beside its activations is counted here: the cache, masks of every row over every key, keys and values read back
from the pages and repeated for each head, logits of every request with the sampler's copies, and oneDNN's code.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from lamina.hf.internals import arguments_of, keeps_scores
from lamina.hf.trace import Trace
from lamina.plan.plan import SHORTEST_CONTEXT, Budget, Plan
from lamina.plan.schedule import Weight
from lamina.tensors.padded_rows import BATCHED_SIZES, CODE_BYTES

MOST_CONTEXTS = 16  # the cache never needs to hold more whole contexts than this at once
BATCH_TOKENS = (512, 256, 128, 64, 32)  # of one pass; a longer prompt is taken in several
MOST_REQUESTS = 128  # in one pass
FEW_REQUESTS = 8  # are worth more than longer passes, and those more than further requests
SHARE_OF_LEFT = 0.9  # when `FEW_REQUESTS` fit: a server has memory of its own
LOGITS_SHARE = 0.25  # of that
PAGE = 32  # tokens: every sequence has at least a page, and transformers' 256 would be room for a few short ones only
GREEDY, SAMPLED = 12, 40  # bytes a logit: as the model gives it, in fp32, sorted, summed up and masked
INDEX = 64  # bytes of an index into the cache: in a tensor, and before that in lists of Python
SHARE_ON_DEVICE = 0.6  # of the room there: the rest is for repeated heads and logits


@dataclass(frozen=True)
class Size:
    """How much a batch may hold: tokens of its cache, tokens and requests of a pass."""

    cache_tokens: int
    batch_tokens: int
    requests: int


@dataclass(frozen=True)
class Need:
    """What a batch of some size takes of the processor's memory.

    Attributes:
        traced: gives the activations of a pass.
        token_bytes: of keys and values, all layers together.
        read_bytes: of keys and values of a token in one layer, as they are read back and repeated for each head.
        score_bytes: a row and key, in each layer, of attention that keeps its scores; 0 where it does not.
        mask_bytes: a row and key.
        readable: tokens that a kind of layer may read for each token that the cache is made for.
        spare_tokens: that the cache has beyond: where padding goes, and what is rounded up.
        logit_bytes: of a request; `logits_of_all`: of every token in its stead.
        shapes: of matrices, for each of which every number of rows has its own code.
    """

    traced: Trace
    token_bytes: float
    read_bytes: int
    score_bytes: int
    mask_bytes: int
    readable: float
    spare_tokens: int
    logit_bytes: int
    logits_of_all: bool
    shapes: int

    def activations(self, size: Size) -> int:
        """Bytes of the activations of a pass."""
        return self.traced.activations(max(size.batch_tokens, SHORTEST_CONTEXT))

    def besides_activations(self, size: Size) -> int:
        """Bytes of everything but the activations."""
        rows, keys = size.batch_tokens, int(self.readable * size.cache_tokens) + size.batch_tokens
        cache = self.cache(size)
        attention = keys * (self.read_bytes + INDEX) + rows * keys * (self.mask_bytes + self.score_bytes)
        logits = (rows if self.logits_of_all else min(size.requests, rows)) * self.logit_bytes
        code = self.shapes * sum(number <= rows for number in BATCHED_SIZES) * CODE_BYTES
        return int(cache + attention + logits + code)

    def cache(self, size: Size) -> int:
        """Bytes of keys and values."""
        return int(self.token_bytes * (size.cache_tokens + self.spare_tokens))

    def of(self, size: Size) -> int:
        """Bytes of all of it."""
        return self.activations(size) + self.besides_activations(size)


def need_of(
    model: Any, plan: Plan, weights: Iterable[Weight], traced: Trace, sampled: bool = False, page: int = PAGE
) -> Need:
    """What batches of this model take.

    Args:
        weights: all that the model has.
        sampled: whether probabilities of tokens are wanted, which takes copies of the logits.
        page: tokens of a page of the cache.
    """
    config = model.config.get_text_config()
    heads, layers = _number(config, "num_attention_heads"), _number(config, "num_hidden_layers")
    kv_heads = _number(config, "num_key_value_heads", heads)
    size = _number(config, "head_dim", _number(config, "hidden_size") // heads)
    itemsize = model.dtype.itemsize
    window = getattr(config, "sliding_window", None)
    kinds = list(Counter(getattr(config, "layer_types", None) or ["all"] * layers).values())
    context = max(plan.budget.context_tokens, 1)
    scores = heads * (3 * itemsize + 4) if keeps_scores(config) else 0
    return Need(
        traced=traced,
        token_bytes=max(2.0 * layers * kv_heads * size * itemsize, traced.cache(context) / context),
        read_bytes=2 * size * itemsize * (kv_heads + 2 * heads),
        score_bytes=scores,
        mask_bytes=itemsize * (2 if window else 1),
        readable=layers / min(kinds),
        spare_tokens=3 * page * math.ceil(math.lcm(*kinds) / layers) + page,
        logit_bytes=_number(config, "vocab_size") * (SAMPLED if sampled else GREEDY),
        logits_of_all="logits_to_keep" not in arguments_of(model),
        shapes=_shapes(plan, weights) if model.dtype in (torch.bfloat16, torch.float16) else 0,
    )


def _number(config: Any, name: str, otherwise: int = 1) -> int:
    """A number of a config; the largest, where each layer has one."""
    found = getattr(config, name, None) or otherwise
    return max(map(int, found)) if isinstance(found, list | tuple) else int(found)


def _shapes(plan: Plan, weights: Iterable[Weight]) -> int:
    """How many shapes the matrices have that a pass multiplies by, blocks of large ones included."""
    matrices = {weight.name: weight.shape for weight in weights if len(weight.shape) == 2}
    found = {shape for name, shape in matrices.items() if name in plan.resident}
    for item in plan.items:
        found |= {(part.count, *matrices[part.weight][1:]) for part in item.parts if part.weight in matrices}
    return len(found)


def room_for_batches(plan: Plan) -> int:
    """Bytes that a batch may have as things are: those of the context, and what nothing else took."""
    budget = plan.budget
    spare = budget.memory_bytes - budget.reserved_bytes - plan.resident_bytes - plan.ring_bytes
    spare -= plan.expert_slots * plan.expert_slot_bytes
    return max(spare, 0) + budget.activation_bytes + budget.kv_cache_bytes


def size_for(need: Need, room: int, context: int) -> Size:
    """The size of the batches that fit `room`; where even the least does not, the least.

    Whole contexts come first, so that a prompt of that length fits; then a few requests, long passes, many requests.
    """
    context = _pages(context)
    fits = [
        Size(context, tokens, min(requests, tokens))
        for requests in (FEW_REQUESTS, 4, 2, 1)
        for tokens in BATCH_TOKENS
        if tokens <= max(context, BATCH_TOKENS[-1])
    ]
    chosen = next((size for size in fits if need.of(size) <= room), None)
    if chosen is None:
        return fits[-1]
    left = int(SHARE_OF_LEFT * (room - need.of(chosen)))
    if chosen.requests == FEW_REQUESTS:
        most = FEW_REQUESTS + (
            chosen.batch_tokens if need.logits_of_all else int(LOGITS_SHARE * left / need.logit_bytes)
        )
        few, chosen = chosen, replace(chosen, requests=min(most, chosen.batch_tokens, MOST_REQUESTS))
        left -= need.of(chosen) - need.of(few)
    page = need.of(replace(chosen, cache_tokens=context + PAGE)) - need.of(chosen)
    tokens = context + max(left // page, 0) * PAGE
    return replace(chosen, cache_tokens=min(tokens, MOST_CONTEXTS * context))


def shorter(need: Need, size: Size, room: int) -> Size | None:
    """The same with a cache of fewer tokens, so that it fits `room`; None where that is no use any more."""
    page = need.of(size) - need.of(replace(size, cache_tokens=size.cache_tokens - PAGE))
    tokens = size.cache_tokens - -(-(need.of(size) - room) // page) * PAGE
    return replace(size, cache_tokens=tokens) if tokens >= SHORTEST_CONTEXT else None


def _pages(tokens: int) -> int:
    return -(-max(tokens, 1) // PAGE) * PAGE


def filled_in(config: ContinuousBatchingConfig, size: Size) -> ContinuousBatchingConfig:
    """The configuration of a batch, with what the caller has not said."""
    config = copy.copy(config)
    requests = size.requests if config.num_blocks is None else max(size.requests, FEW_REQUESTS)
    if config.num_blocks is None:
        config.num_blocks = max(size.cache_tokens // config.page_size, 1)
    if config.max_batch_tokens is None:
        config.max_batch_tokens = size.batch_tokens
    if config.max_requests_per_batch is None:
        config.max_requests_per_batch = requests
    return config


def size_of(config: ContinuousBatchingConfig) -> Size:
    """What a configuration says."""
    assert config.num_blocks and config.max_batch_tokens and config.max_requests_per_batch
    return Size(config.num_blocks * config.page_size, config.max_batch_tokens, config.max_requests_per_batch)


def config_on_device(budget: Budget, plan: Plan, traced: Trace) -> ContinuousBatchingConfig:
    """The configuration on an accelerator, whose paged attention needs no masks and may insist on a size of pages."""
    assert budget.device_memory_bytes is not None
    config = ContinuousBatchingConfig()
    spare = budget.device_memory_bytes - budget.reserved_bytes_on_device - plan.resident_bytes
    spare = max(spare - max(plan.ring_bytes, plan.device_ring_bytes), 0)
    context = max(budget.context_tokens, 1)
    per_token = max(traced.cache(context) / context, 1.0)
    tokens = min(SHARE_ON_DEVICE * (budget.kv_cache_bytes + spare) / per_token, MOST_CONTEXTS * context)
    config.num_blocks = max(int(tokens // config.page_size), 1)
    config.max_batch_tokens = min(context, BATCH_TOKENS[0])
    config.max_requests_per_batch = MOST_REQUESTS
    return config
