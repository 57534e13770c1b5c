"""One measured run of a model, beside what its disk can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lamina.checkpoint import Extent
from lamina.errors import RequestError
from lamina.model.auto import AutoModel
from lamina.plan.planner import Plan
from lamina.stream.probe import SETTINGS, measure_disk

ROUNDS = 2  # of each reader setting, for the ceiling


def bench_model(
    model: str,
    *,
    memory: int | str | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 8,
    prompt_ids: Sequence[int] | None = None,
    context: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load, generate greedily, and measure; then read one pass's bytes again with nothing else going on.

    Args:
        model, memory, context, progress, options: as for `AutoModel.from_pretrained`.
        prompt_tokens: length of the prompt where `prompt_ids` does not give one.
        new_tokens: tokens to generate; the end-of-text token is not taken.
        prompt_ids: token ids of the prompt.

    Returns:
        Seconds, bytes and rates by name. `disk_fraction` is the rate at which the stream read during the
        decode steps over the best rate at which the drive gave the same bytes alone; None if nothing streams.
    """
    if new_tokens < 2:
        raise RequestError(f"a decode step needs at least 2 new tokens, got {new_tokens}")
    ids = list(prompt_ids) if prompt_ids else [1 + i % 97 for i in range(prompt_tokens)]
    if context is None:
        context = len(ids) + new_tokens
    loaded = AutoModel.from_pretrained(model, memory=memory, context=context, progress=progress, **options)
    began = time.perf_counter()
    tokens = _generate(loaded, ids, new_tokens)
    seconds = time.perf_counter() - began
    stats, plan = loaded.lamina.stats, loaded.lamina.plan
    loaded.lamina.close()
    del loaded
    disk = disk_ceiling(plan) if plan.bytes_read_per_pass else 0.0
    return {
        "seconds_per_token": stats.seconds_per_token,
        "time_to_first_token_seconds": stats.time_to_first_token_seconds,
        "load_seconds": stats.load_seconds,
        "bytes_read_per_pass": stats.bytes_read_per_pass,
        "read_bytes_per_second": stats.read_bytes_per_second,
        "disk_bytes_per_second": disk,
        "disk_fraction": stats.read_bytes_per_second / disk if disk else None,
        "tokens_per_pass": stats.tokens_per_pass,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "memory_budget_bytes": stats.memory_budget_bytes,
        "resident_bytes": stats.resident_bytes,
        "model_bytes": stats.model_bytes,
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "new_tokens": len(tokens),
        "passes": stats.passes,
        "generate_seconds": seconds,
        "seconds_waiting_for_disk": stats.seconds_waiting_for_disk,
        "predicted_seconds_per_token": plan.predicted_seconds_per_token,
    }


def disk_ceiling(plan: Plan) -> float:
    """Bytes per second of a pass's own reads, in their order, by readers that do nothing else: the best setting."""
    extents = [
        Extent(read.file, read.offset, read.needed)
        for index in plan.steps
        if not plan.items[index].cached
        for read in plan.items[index].layout.reads
    ]
    return max(measure_disk(extents, settings=SETTINGS) for _ in range(ROUNDS))


def _generate(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> list[int]:
    prompt = torch.tensor([list(ids)], device=model.device)
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return [int(token) for token in out[0, len(ids) :]]
