"""From a name and a number of bytes to a transformers model that streams."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.caller import option
from lamina.checkpoint import Checkpoint, open_checkpoint
from lamina.checkpoint.choose import choose_gguf, find_gguf, local_names, split_name
from lamina.errors import BudgetError, MissingShardError, RequestError
from lamina.hf.arguments import check_format
from lamina.hf.building.build import Request, build, config_place
from lamina.hf.building.classes import text_alone
from lamina.hf.building.gguf import GgufModel, load_gguf
from lamina.hf.config import blaming, fields_of, refuse_adapter
from lamina.hf.names import PreTrainedModel
from lamina.hf.tokenizer import Lazy, load_processor, load_tokenizer, tokenizer_bytes
from lamina.hf.trace import Trace, trace
from lamina.host import return_large_blocks
from lamina.hub import HUB_OPTIONS, local_path, locate, locate_gguf, metadata_folder, outline_gguf, remote_headers
from lamina.plan.forecast import Hardware
from lamina.plan.plan import SHORTEST_CONTEXT, Budget, Plan
from lamina.plan.planner import make_plan, minimum_memory
from lamina.progress import Progress
from lamina.runtime.budget import choose_device, default_context, make_budget, smaller_budgets
from lamina.runtime.engine import Engine
from lamina.runtime.handle import Lamina
from lamina.runtime.rates import assume, measure
from lamina.stream.readers import Readers
from lamina.tensors.own_products import chosen
from lamina.tensors.torch_pickle import read_pickled
from lamina.weights.describe import Weights, describe, prepare, without_kernels

LONG = 0.3  # seconds to read the drive for a plan alone
Encode = Callable[[PreTrainedModel, Checkpoint, Trace, Weights], Checkpoint]
"""(model, its checkpoint, its trace, its weights) -> the checkpoint to describe in place of that one"""
HEADER_TIMES = 23  # bytes of memory for the tokenizer, for each of a GGUF header, which is mostly vocabulary


@dataclass(frozen=True)
class Described:
    """A model that is built and traced.

    Attributes:
        there: what can be read; `checkpoint` but where that one is only meant.
        tokenizer_bytes: what its tokenizer will take.
        loading_info: what transformers' loader says of names and shapes.
    """

    model: PreTrainedModel
    weights: Weights
    trace: Trace
    request: Request
    checkpoint: Checkpoint
    there: Checkpoint
    tokenizer_bytes: int
    loading_info: Mapping[str, Any] = field(default_factory=dict)


def describe_model(
    model: str,
    options: dict[str, Any],
    progress: Progress | None = None,
    weights_wanted: bool = True,
    encode: Encode | None = None,
) -> Described:
    """A model that is built and traced; nothing is decided about its memory yet.

    Args:
        options: of `from_pretrained`; what is used up here is taken out.
        weights_wanted: download them; else the headers are enough.
        encode: as for `plan_model`.
    """
    request, checkpoint = _files(str(model), options, progress, weights_wanted)
    check_format(options, checkpoint)
    found: dict[str, Any] = {}
    built = build(request, checkpoint, found)
    traced, weights = _traced(built, checkpoint, request)
    there = checkpoint
    if encode is not None:
        checkpoint = encode(built, checkpoint, traced, weights)
        built = build(request, checkpoint)
        traced, weights = _traced(built, checkpoint, request)
    tokenizer = tokenizer_bytes(request.folder)
    if request.gguf is not None:
        tokenizer = HEADER_TIMES * request.gguf.header_bytes
    return Described(built, weights, traced, request, checkpoint, there, tokenizer, found)


def _traced(built: PreTrainedModel, checkpoint: Checkpoint, request: Request) -> tuple[Trace, Weights]:
    with blaming(config_place(request), fields_of(built.config), "a forward pass"):
        traced = trace(built)
        return traced, describe(built, checkpoint, traced)


def _files(
    model: str, options: dict[str, Any], progress: Progress | None, weights_wanted: bool
) -> tuple[Request, Checkpoint]:
    """The small files that are meant, with what was asked for, and the checkpoint's tensors."""
    trust = bool(options.pop("trust_remote_code", False))
    options.pop("output_loading_info", None)
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    variant = options.pop("variant", None)
    model, chosen = chosen_gguf(model, options.pop("gguf_file", None))
    own = {key: value for key, value in options.items() if key not in hub}
    if outlined := _outlined(model, hub, chosen, own, weights_wanted):
        request, checkpoint = Request(outlined.path, options, trust, outlined), outlined.checkpoint
    elif file := _gguf_file(model, hub, chosen, progress, weights_wanted):
        gguf = load_gguf(file, own)
        request, checkpoint = Request(gguf.path, options, trust, gguf), gguf.checkpoint
    else:
        folder, checkpoint = _open(model, hub, variant, trust, progress, weights_wanted)
        if said := refuse_adapter(os.path.join(folder, hub.get("subfolder", "")), model):
            checkpoint = dataclasses.replace(checkpoint, fallbacks=(*checkpoint.fallbacks, said))
        request = Request(folder, options, trust)
    options.pop("subfolder", None)  # the folder is that one already
    return request, checkpoint


def _open(
    model: str, hub: Mapping[str, Any], variant: str | None, trust: bool, progress: Progress | None, wanted: bool
) -> tuple[str, Checkpoint]:
    """Folder of the small files, and the checkpoint's tensors."""
    open_any = functools.partial(open_checkpoint, read_pickled=read_pickled)
    if _is_local(model):
        checkpoint = open_any(os.path.expanduser(model), variant=variant, subfolder=hub.get("subfolder", ""))
        return checkpoint.root, checkpoint
    if wanted:
        found = locate(model, variant=variant, progress=progress, trust_remote_code=trust, **hub)
    else:
        folder = metadata_folder(model, trust_remote_code=trust, **hub)
        remote = {key: value for key, value in hub.items() if key in ("revision", "token", "subfolder")}
        return os.path.join(folder, hub.get("subfolder", "")), remote_headers(model, variant=variant, **remote)
    checkpoint = open_any(found, variant=variant, subfolder=hub.get("subfolder", ""))
    return checkpoint.root, checkpoint


def chosen_gguf(model: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The model alone, and which GGUF file of it was asked for, either way.

    Raises:
        RequestError: both ways, and not the same.
    """
    model, chosen = split_name(model)
    if chosen and gguf_file and chosen != gguf_file:
        raise RequestError(f"{model}:{chosen} and {option('gguf_file', gguf_file)} name two GGUF files: give one")
    return model, chosen or gguf_file


def _outlined(
    model: str, hub: Mapping[str, Any], name: str | None, options: Mapping[str, Any], wanted: bool
) -> GgufModel | None:
    """A GGUF file that is still on the hub, from its header, for a plan; None where it is here or something else."""
    if wanted or name is None or _is_local(model):
        return None
    local_path(model)  # says what is wrong with one that can only be a path
    with contextlib.suppress(MissingShardError):
        locate_gguf(model, name, wanted=False, **hub)
        return None
    with outline_gguf(model, name, **hub) as (path, addresses):
        gguf = load_gguf(path, options)
    tensors = {
        each: dataclasses.replace(entry, extent=dataclasses.replace(entry.extent, file=addresses[entry.extent.file]))
        for each, entry in gguf.checkpoint.tensors.items()
    }
    checkpoint = dataclasses.replace(gguf.checkpoint, tensors=tensors, files=tuple(addresses.values()), fingerprints={})
    return dataclasses.replace(gguf, path=addresses[gguf.path], checkpoint=checkpoint)


def _gguf_file(
    model: str, hub: Mapping[str, Any], name: str | None, progress: Progress | None, wanted: bool
) -> str | None:
    """The GGUF file that is meant: named by itself, by `gguf_file` or its own name's end, or the only weights there."""
    subfolder = hub.get("subfolder", "")
    if name is None:
        return find_gguf(os.path.join(model, subfolder) if subfolder else model)
    if _is_local(model):
        root = os.path.join(os.path.expanduser(model), subfolder)
        path = os.path.join(root, name)
        return path if os.path.isfile(path) else os.path.join(root, choose_gguf(local_names(root), name, model))
    local_path(model)  # says what is wrong with one that can only be a path
    return locate_gguf(model, name, progress=progress, wanted=wanted, **hub)


def _is_local(model: str) -> bool:
    return os.path.exists(os.path.expanduser(model))


Reserve = Callable[[Described, torch.device], Callable[[int], int]]
"""(what is about to be planned, its device) -> (tokens of context -> bytes that something else has of its memory)"""


@dataclass(frozen=True)
class Asked:
    """The memory that a model is to have, where it computes, and its progress callback; see `lamina.AutoModel`.

    Attributes:
        reserve: what else is to have room in the same memory.
        kernels: whose products of a few rows: `lamina.tensors.own_products.KERNELS`; None is torch's.
    """

    memory: float | str | None = None
    device_memory: float | str | None = None
    device: str | torch.device = "auto"
    context: int | None = None
    progress: Progress | None = None
    reserve: Reserve | None = None
    kernels: str | None = None


def load_model(model: str, asked: Asked, options: dict[str, Any], *, prefetching: bool = True) -> PreTrainedModel:
    """A checkpoint as a transformers model that streams.

    Args:
        options: as `lamina.hf.arguments.sorted_out` gives them; what is used up here is taken out.
        prefetching: see `lamina.AutoModel.from_pretrained`, whose errors are these.
    """
    began = time.perf_counter()
    prepared = _prepare(model, asked, options)
    own, without_own = chosen(asked.kernels, prepared.device, prepared.model.dtype)
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
    streamed.lamina.own_kernels = own
    streamed.lamina.fallbacks.say((*engine.plan.fallbacks, *([] if without_own is None else [without_own])))
    streamed.lamina.attach()
    _give_tokenizer(streamed, prepared.request, {key: options[key] for key in HUB_OPTIONS if key in options})
    return streamed


def _give_tokenizer(model: PreTrainedModel, request: Request, hub: Mapping[str, Any]) -> None:
    """Let the model have its tokenizer and its processor, which are loaded when they are first used."""
    folder, trust, gguf = request.folder, request.trust_remote_code, request.gguf
    tokenizer = Lazy(model, gguf.load_tokenizer if gguf is not None else lambda: load_tokenizer(folder, trust, **hub))
    processor = Lazy(
        model,
        tokenizer.real if gguf is not None else lambda: load_processor(folder, trust, tokenizer.real, **hub),
        "processor",
    )
    for lazy, name in ((tokenizer, "tokenizer"), (processor, "processor")):
        object.__setattr__(model, name, lazy)  # nn.Module would look at its class, and so load it
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
    """For a plan that is only shown: rates, of the weights or of made-up ones where these are not here; fallbacks."""
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
    """Second ways of a model: in its files, in the trace, in unpacking, in reading as far as was read."""
    said = text_alone(prepared.model, prepared.there.tensors)
    found = [
        *([] if said is None else [said]),
        *prepared.there.fallbacks,
        *prepared.trace.fallbacks,
        *without_kernels(prepared.weights.schedule.weights.values()),
        *_in_parts(prepared.plan.budget if isinstance(prepared, Prepared) else None),
    ]
    return (*found, *(readers.fallbacks if readers is not None else ()))


def _in_parts(budget: Budget | None) -> Iterator[str]:
    if budget is not None and budget.chunk_tokens:
        waiting = ", and keys and values wait in host memory" if budget.cache_layers else ""
        yield (
            f"the device has no room for a prompt of {budget.context_tokens} tokens at once: it is taken in chunks of "
            f"{budget.chunk_tokens}{waiting}, which rounds otherwise than a whole one"
        )


def _prepare(
    model: str, asked: Asked, options: dict[str, Any], weights_wanted: bool = True, encode: Encode | None = None
) -> Prepared:
    device = choose_device(asked.device)
    described = describe_model(model, options, asked.progress, weights_wanted, encode)
    gc.collect()  # what transformers' loader left behind must not count as overhead
    also = asked.reserve(described, device) if asked.reserve is not None else None
    most = default_context(described.model.config)
    plan = plan_described(described, asked.memory, asked.device_memory, device, asked.context, most, also)
    return Prepared(plan=plan, device=device, **vars(described))


def plan_described(
    described: Described,
    memory: float | str | None,
    device_memory: float | str | None,
    device: torch.device,
    context: int | None,
    most: int,
    reserve: Callable[[int], int] | None,
) -> Plan:
    """The plan; where `context` is None, for the longest usual context that the memory has room for."""
    weights, traced, tokenizer = described.weights, described.trace, described.tokenizer_bytes

    def budget(tokens: int) -> Budget:
        scratch, also = weights.schedule.scratch_bytes, reserve(tokens) if reserve is not None else 0
        return make_budget(memory, device_memory, device, traced, tokens, scratch, tokenizer, also)

    def planned(asked: Budget) -> Plan:
        try:
            return make_plan(weights.schedule, asked)
        except BudgetError as error:
            there = asked.device_memory_bytes
            if there is None or asked.draft_bytes or there >= minimum_memory(weights.schedule, asked)[1]:
                raise
            refusal = error
        for smaller in smaller_budgets(asked, traced, described.model.config, device):
            try:
                return make_plan(weights.schedule, smaller)
            except BudgetError as error:
                refusal = error
        raise refusal

    if context is not None:
        return planned(budget(context))
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
