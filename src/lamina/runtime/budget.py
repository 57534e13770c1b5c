"""How much of the memory is spoken for before any weight is: the process itself, activations, the cache."""

from __future__ import annotations

from typing import Any

import torch

from lamina.hf.trace import Trace
from lamina.host import free_memory, release_freed, resident_bytes
from lamina.plan.plan import SHORTEST_CONTEXT, Budget
from lamina.sizes import parse_memory
from lamina.stream.readers import BOUNCE, THREADS

MB = 1_000_000
BASE = 440 * MB  # Python, torch and transformers (360 to 385 when the plan is made), and WORKSPACE
WORKSPACE = 32 * MB  # of BASE: code that oneDNN makes, stacks of threads, what the allocator keeps
STEP = 32 * MB
LEFT = 40 * MB  # what a model that was here before leaves, and the next one uses again (kernels' code, free memory)
DEFAULT_CONTEXT = 2048  # tokens, where nobody says how many
SHARE_OF_FREE = 0.9  # of free memory, where nobody says how much

_last_held: int | None = None


def already_held() -> int:
    """What this process holds that `BASE` has no room for: other libraries, data, another model.

    In coarse steps, and the same number again until it is clearly another one, so that a plan that is made twice asks
    for the same memory. What the allocator keeps of freed memory is not held: it is given back first.
    """
    global _last_held
    release_freed()
    beyond = resident_bytes() + WORKSPACE + THREADS * BOUNCE - BASE
    if _last_held is None or not beyond - LEFT <= _last_held <= beyond + 2 * STEP:
        _last_held = max(0, -(-beyond // STEP) * STEP)
    return _last_held


def make_budget(
    memory: float | str | None,
    device_memory: float | str | None,
    device: torch.device,
    trace: Trace,
    context: int,
    scratch_bytes: int = 0,
    tokenizer_bytes: int = 0,
    draft_bytes: int = 0,
) -> Budget:
    """The budget of a request.

    Args:
        memory: bytes or text for the process; None for most of what is free.
        device_memory: the same for the accelerator; None for most of what is free there.
        device: where the model computes.
        trace: gives activations and cache for the context.
        context: tokens of prompt and answer together.
        scratch_bytes: what decoding weights takes.
        tokenizer_bytes: what the tokenizer takes.
        draft_bytes: what a draft takes.
    """
    given = parse_memory(memory, what="memory") if memory is not None else int(free_memory() * SHARE_OF_FREE)
    on_device = None
    if device.type != "cpu":
        on_device = _device_bytes(device_memory, device)
    return Budget(
        memory_bytes=given,
        overhead_bytes=BASE + tokenizer_bytes,
        already_held_bytes=already_held(),
        activation_bytes=trace.activations(max(context, SHORTEST_CONTEXT)),  # kernels' workspace does not shrink on
        kv_cache_bytes=trace.cache(context),
        context_tokens=context,
        device_memory_bytes=on_device,
        scratch_bytes=scratch_bytes,
        draft_bytes=draft_bytes,
    )


def _device_bytes(device_memory: float | str | None, device: torch.device) -> int:
    if device_memory is not None:
        return parse_memory(device_memory, what="device_memory")
    module: Any = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0] * SHARE_OF_FREE)
    return int(free_memory() * SHARE_OF_FREE / 2)


def default_context(config: Any) -> int:
    """Tokens to make room for where nobody says: what the model takes, up to `DEFAULT_CONTEXT`."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return min(DEFAULT_CONTEXT, most) if isinstance(most, int) and most > 0 else DEFAULT_CONTEXT
