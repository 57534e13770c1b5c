"""What is asked for, looked at and counted before any weight is read: wrong values, the device, the reserved bytes.

The process itself, activations and the cache have their share of the memory before any weight has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lamina.caller import option
from lamina.checkpoint.manifest import check_compression
from lamina.errors import RequestError
from lamina.hf.arguments import check_computing
from lamina.hf.trace import Trace
from lamina.host import free_memory, release_freed, resident_bytes
from lamina.plan.plan import SHORTEST_CONTEXT, Budget
from lamina.sizes import parse_memory
from lamina.stream.readers import BOUNCE, THREADS

MOST_CONTEXT = 2**31 - 1  # tokens; positions are counted in 32 bits by some kernels
MB = 1_000_000
BASE = 440 * MB  # Python, torch and transformers (360 to 385 when the plan is made), and WORKSPACE
WORKSPACE = 32 * MB  # of BASE: code that oneDNN makes, stacks of threads, what the allocator keeps
STEP = 32 * MB
LEFT = 40 * MB  # what a model that was here before leaves, and the next one uses again (kernels' code, free memory)
DEFAULT_CONTEXT = 2048  # tokens, where the user gives no number
MOST_TAKEN = 1000 * MB  # by a driver's context and its libraries' kernels and workspaces
FUSED = ("cuda", "xpu", "mps")  # attention there keeps no scores
OFFLOADING = ("cuda",)  # transformers' cache in host memory knows no other
MASK, SCORE = 4, 12  # bytes a row and key: of a mask, of scores with their softmax and its copy
UNIFIED_WINDOW = 8  # of one memory for both, this part is the window that is read into; the rest is the device's
SHARE_OF_FREE = 0.9  # of free memory, where the user gives no amount

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
        scratch_bytes: what unpacking weights takes.
        tokenizer_bytes: what the tokenizer takes.
        draft_bytes: what a draft takes.
    """
    given = parse_memory(memory, what="memory") if memory is not None else int(free_memory() * SHARE_OF_FREE)
    overhead, held = BASE + tokenizer_bytes, already_held()
    on_device, taken = None, 0
    if device.type != "cpu":
        taken = device_overhead(device)
        on_device = _device_bytes(device_memory, device, taken)
        if is_unified(device):  # one memory: what the device has, the process does not have again
            window = max(given - overhead - held, 0) // UNIFIED_WINDOW
            whole, given = given, min(given, overhead + held + window)
            on_device = min(on_device, whole - given)
    return Budget(
        memory_bytes=given,
        overhead_bytes=overhead,
        already_held_bytes=held,
        activation_bytes=trace.activations(max(context, SHORTEST_CONTEXT)),  # kernels' workspace does not shrink on
        kv_cache_bytes=trace.cache(context),
        context_tokens=context,
        device_memory_bytes=on_device,
        device_overhead_bytes=taken,
        scratch_bytes=scratch_bytes,
        draft_bytes=draft_bytes,
    )


CHUNKS = (512, 128, 32)  # tokens of a prompt at once, where all of it takes too much


def smaller_budgets(budget: Budget, trace: Trace, config: Any, device: torch.device) -> Iterator[Budget]:
    """What a device may be asked for where it has no room for a whole prompt: chunks of it, then the cache on the host.

    transformers does both: `prefill_chunk_size`, and `cache_implementation="offloaded"`.
    """
    context, cache = budget.context_tokens, trace.cache(budget.context_tokens)
    layers, heads, kv_heads = _attention_of(config)
    if not layers or not cache:
        return
    repeated = 2 * cache // layers * heads // kv_heads  # keys and values, for every head
    for there in (0, layers) if device.type in OFFLOADING else (0,):
        for chunk in (each for each in CHUNKS if each < context):
            scores = 0 if device.type in FUSED else heads
            attention = repeated + chunk * context * (MASK + scores * SCORE)
            activations = trace.activations(max(chunk, SHORTEST_CONTEXT)) + attention
            if activations < budget.activation_bytes or there:
                chunked = replace(budget, activation_bytes=activations, chunk_tokens=chunk, cache_layers=there)
                yield chunked.with_cache(cache)


def _attention_of(config: Any) -> tuple[int, int, int]:
    """Layers, heads, and heads of keys and values of a decoder; 0 where its layers are of several kinds."""
    text = config.get_text_config()
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not isinstance(layers, int) or not isinstance(heads, int) or kinds or config.is_encoder_decoder:
        return 0, 0, 0
    return layers, heads, getattr(text, "num_key_value_heads", None) or heads


def _device_bytes(device_memory: float | str | None, device: torch.device, taken: int) -> int:
    """What the process may have on the device, `taken` bytes of it by the driver already."""
    if device_memory is not None:
        return parse_memory(device_memory, what="device_memory")
    module: Any = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0] * SHARE_OF_FREE) + taken
    return int(free_memory() * SHARE_OF_FREE)


def is_unified(device: torch.device) -> bool:
    """Whether a device computes in the memory of the process: Apple's, Jetson's, integrated ones."""
    if device.type == "mps":
        return True
    return device.type == "cuda" and bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def device_overhead(device: torch.device) -> int:
    """Bytes that a device's driver and libraries have for this process, beside tensors: `nvidia-smi` counts them.

    A product and an attention run first, because kernels and workspaces are loaded with the first of them. What other
    processes have cannot be told apart, so it counts up to `MOST_TAKEN`.
    """
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return 0
    with torch.inference_mode():
        one = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.scaled_dot_product_attention(one @ one, one, one)
    torch.accelerator.synchronize(device)
    free, total = module.mem_get_info(device)
    tensors = module.memory_reserved(device) if hasattr(module, "memory_reserved") else 0
    return int(min(max(total - free - tensors, 0), MOST_TAKEN))


def default_context(config: Any) -> int:
    """Tokens to make room for by default: what the model takes, up to `DEFAULT_CONTEXT`."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return min(DEFAULT_CONTEXT, most) if isinstance(most, int) and most > 0 else DEFAULT_CONTEXT


def check_options(
    options: Mapping[str, Any],
    *,
    memory: float | str | None = None,
    device_memory: float | str | None = None,
    device: str | torch.device = "auto",
    context: int | None = None,
    compression: str | None = None,
) -> None:
    """Refuse a value that no model could be loaded with.

    Args:
        options: transformers' own.

    Raises:
        RequestError: it says which, and what may be given.
    """
    for name, size in (("memory", memory), ("device_memory", device_memory)):
        if size is not None:
            parse_memory(size, what=name)
    choose_device(device)
    if compression is not None:
        check_compression(compression)
    if context is not None:
        check_context(context)
    check_computing(options)


def check_context(context: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(context, bool) or not hasattr(context, "__index__"):
        raise RequestError(f"{option('context')} must be a whole number of tokens, got {context!r}")
    if not 1 <= context <= MOST_CONTEXT:
        raise RequestError(f"{option('context')} must be 1 to {MOST_CONTEXT} tokens, got {context}")


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device of a request.

    Raises:
        RequestError: no such device here.
    """
    if str(device) == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "meta"):
            torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0][:120]
        raise RequestError(
            f"device {str(device)!r} cannot be used here: {text}; try {option('device', 'cpu')}"
        ) from error
    if chosen.type == "meta":
        raise RequestError("device 'meta' computes nothing: use 'auto', 'cpu' or an accelerator")
    return chosen
