"""From a name and a number of bytes to a transformers model that streams."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lamina.caller import option
from lamina.errors import BudgetError, RequestError
from lamina.hf.build import Request
from lamina.hf.names import PreTrainedModel
from lamina.hf.tokenizer import LazyTokenizer, load_tokenizer
from lamina.hub import HUB_OPTIONS
from lamina.plan.forecast import Hardware
from lamina.plan.plan import SHORTEST_CONTEXT, Budget, Plan
from lamina.plan.planner import make_plan, minimum_memory
from lamina.progress import Progress
from lamina.runtime.budget import default_context, make_budget
from lamina.runtime.describe import Described, Encode, describe_model
from lamina.runtime.engine import Engine
from lamina.runtime.handle import Lamina
from lamina.runtime.rates import assume, measure, prepare, without_kernels
from lamina.stream.probe import return_large_blocks
from lamina.stream.readers import Readers

LONG = 0.3  # seconds to read the drive for a plan alone


Beside = Callable[[Described, torch.device], Callable[[int], int]]
"""(what is about to be planned, its device) -> (tokens of context -> bytes that something else has of its memory)"""


@dataclass(frozen=True)
class Asked:
    """The memory that a model is to have, where it computes, and who hears of it; see `lamina.AutoModel`.

    Attributes:
        beside: what else is to have room in the same memory.
    """

    memory: float | str | None = None
    device_memory: float | str | None = None
    device: str | torch.device = "auto"
    context: int | None = None
    progress: Progress | None = None
    beside: Beside | None = None


def load_model(model: str, asked: Asked, options: dict[str, Any], *, prefetching: bool = True) -> PreTrainedModel:
    """A checkpoint as a transformers model that streams.

    Args:
        options: as `lamina.hf.arguments.sorted_out` gives them; what is used up here is taken out.
        prefetching: see `lamina.AutoModel.from_pretrained`, whose errors are these.
    """
    began = time.perf_counter()
    prepared = _prepare(model, asked, options)
    prepare(prepared.weights.schedule.weights.values())
    readers = Readers(fingerprints=prepared.checkpoint.fingerprints)
    engine = Engine(prepared.model, prepared.weights, prepared.plan, prepared.device, readers, prefetching)
    return_large_blocks()
    try:
        engine.revise(hardware=measure(engine, prepared.checkpoint))
        engine.start(prepared.model, asked.progress)
        engine.revise(fallbacks=_fallbacks(prepared, readers))
        readers.remember()
        prepared.checkpoint.verify_unchanged()  # while it was loaded, or since its headers were read
    except BaseException:
        engine.close()
        raise
    streamed = prepared.model
    streamed.lamina = Lamina(streamed, engine, prepared.trace, time.perf_counter() - began)
    streamed.lamina.loading_info = prepared.loading_info
    streamed.lamina.fallbacks.say(engine.plan.fallbacks)
    streamed.lamina.attach()
    _give_tokenizer(streamed, prepared.request, {key: options[key] for key in HUB_OPTIONS if key in options})
    return streamed


def _give_tokenizer(model: PreTrainedModel, request: Request, hub: Mapping[str, Any]) -> None:
    """Let the model have its tokenizer, which is loaded when it is first used."""
    lazy = LazyTokenizer(
        model,
        request.gguf.load_tokenizer
        if request.gguf is not None
        else lambda: load_tokenizer(request.folder, request.trust_remote_code, **hub),
    )
    object.__setattr__(model, "tokenizer", lazy)  # nn.Module would look at its class, and so load it
    model.lamina.when_closed(lazy.forget)


@dataclass(frozen=True, kw_only=True)
class Prepared(Described):
    """A model that is planned as well; nothing of it is read yet."""

    plan: Plan
    device: torch.device


def plan_model(model: str, asked: Asked, options: dict[str, Any], encode: Encode | None = None) -> Plan:
    """What `load_model` would do, from the config and the headers alone.

    Args:
        encode: gives the checkpoint that is meant in place of the one that is there.
    """
    prepared = _prepare(model, asked, options, weights_wanted=False, encode=encode)
    hardware, fallbacks = _found(prepared, encode is not None)
    return dataclasses.replace(prepared.plan, hardware=hardware, fallbacks=fallbacks)


def check_memory(model: str, asked: Asked, options: dict[str, Any], encode: Encode | None = None) -> None:
    """Refuse what `load_model` would refuse for its memory, before a store is written.

    Raises:
        BudgetError: the memory is too small, as for `load_model`.
    """
    _prepare(model, asked, options, encode=encode)


def _found(prepared: Prepared, not_written: bool) -> tuple[Hardware, tuple[str, ...]]:
    """For a plan that nobody executes: rates, of the weights or of made-up ones where these are not here; fallbacks."""
    weights, plan, there = prepared.weights, prepared.plan, prepared.there
    prepare(weights.schedule.weights.values())
    if not_written or any(entry.extent.file.startswith("hf://") for entry in there.tensors.values()):
        return assume(weights.schedule, there, plan.streams, prepared.device), _fallbacks(prepared, None)
    with contextlib.closing(Readers(fingerprints=there.fingerprints)) as readers:
        hardware = measure(Engine(prepared.model, weights, plan, prepared.device, readers), there, LONG)
        if there.tensors:
            readers.look(next(iter(there.tensors.values())).extent.file)
        return hardware, _fallbacks(prepared, readers)


def _fallbacks(prepared: Described, readers: Readers | None) -> tuple[str, ...]:
    """Second ways of a model: in its files, in the trace, in decoding, in reading as far as was read."""
    found = [
        *prepared.there.fallbacks,
        *prepared.trace.fallbacks,
        *without_kernels(prepared.weights.schedule.weights.values()),
    ]
    return (*found, *(readers.fallbacks if readers is not None else ()))


def _prepare(
    model: str, asked: Asked, options: dict[str, Any], weights_wanted: bool = True, encode: Encode | None = None
) -> Prepared:
    device = choose_device(asked.device)
    described = describe_model(model, options, asked.progress, weights_wanted, encode)
    gc.collect()  # what transformers' loader left behind must not count as overhead
    also = asked.beside(described, device) if asked.beside is not None else None
    most = default_context(described.model.config)
    plan = plan_described(described, asked.memory, asked.device_memory, device, asked.context, most, also)
    return Prepared(plan=plan, device=device, **{f.name: getattr(described, f.name) for f in fields(described)})


def plan_described(
    described: Described,
    memory: float | str | None,
    device_memory: float | str | None,
    device: torch.device,
    context: int | None,
    most: int,
    beside: Callable[[int], int] | None,
) -> Plan:
    """The plan; where nobody said how long the context is, the longest usual one that the memory has room for."""
    weights, traced, tokenizer = described.weights, described.trace, described.tokenizer_bytes

    def budget(tokens: int) -> Budget:
        scratch, also = weights.schedule.scratch_bytes, beside(tokens) if beside is not None else 0
        return make_budget(memory, device_memory, device, traced, tokens, scratch, tokenizer, also)

    if context is not None:
        return make_plan(weights.schedule, budget(context))
    tokens = most
    shortest = budget(min(SHORTEST_CONTEXT, most))
    while tokens > shortest.context_tokens:
        try:
            plan = make_plan(weights.schedule, budget(tokens))
        except BudgetError:
            tokens = max(tokens // 2, shortest.context_tokens)
            continue
        least, least_on_device = minimum_memory(weights.schedule, shortest)
        return dataclasses.replace(plan, minimum_memory_bytes=least, minimum_device_memory_bytes=least_on_device)
    return make_plan(weights.schedule, shortest)


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
