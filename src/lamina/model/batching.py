"""Continuous batching inside the budget: how large transformers' paged cache may be.

transformers sizes the cache of `generate_batch` by the memory of the machine. A model with a budget sizes it
by what the plan leaves: the room for its context, and whatever no weight took.
"""

from __future__ import annotations

from transformers import ContinuousBatchingConfig

from lamina.model.trace import Trace
from lamina.plan.plan import Plan

SHARE = 0.6  # of the room: the rest is for masks, indices, repeated heads and logits
MOST_CONTEXTS = 16  # the cache never needs to hold more whole contexts than this at once
MOST_BATCH_TOKENS = 512  # of one pass; a longer prompt is taken in several
MOST_REQUESTS = 128  # in one pass
PAGE = 32  # tokens: every sequence has at least a page, and transformers' 256 would be room for a few short ones only


def batching_config(plan: Plan, traced: Trace) -> ContinuousBatchingConfig:
    """The configuration for `generate_batch` where the caller gives none.

    Args:
        plan: what lives where; its budget bounds the cache.
        traced: gives the cache bytes of a token.
    """
    config = ContinuousBatchingConfig()
    budget = plan.budget
    if not budget.on_device:  # an accelerator's paged attention may insist on its own size
        config.page_size = PAGE
    given = budget.memory_bytes if budget.device_memory_bytes is None else budget.device_memory_bytes
    taken = budget.spoken_for if budget.device_memory_bytes is None else budget.spoken_for_on_device
    spare = max(given - taken - plan.resident_bytes - max(plan.ring_bytes, plan.device_ring_bytes), 0)
    context = max(budget.context_tokens, 1)
    per_token = max(traced.cache(context) / context, 1.0)
    tokens = min(SHARE * (budget.kv_cache_bytes + spare) / per_token, MOST_CONTEXTS * context)
    config.num_blocks = max(int(tokens // config.page_size), 1)
    config.max_batch_tokens = min(context, MOST_BATCH_TOKENS)
    config.max_requests_per_batch = MOST_REQUESTS
    return config
