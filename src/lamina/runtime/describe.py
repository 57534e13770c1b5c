"""From a name to a model that is built and traced: which files are meant, and what they say; nothing is planned yet."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.caller import option
from lamina.checkpoint import Checkpoint, open_checkpoint
from lamina.checkpoint.choose import choose_gguf, find_gguf, local_names, split_name
from lamina.errors import RequestError
from lamina.hf.adapter import refuse_adapter
from lamina.hf.arguments import check_format
from lamina.hf.build import Request, build, config_place
from lamina.hf.config import blaming, fields_of
from lamina.hf.gguf import load_gguf
from lamina.hf.names import PreTrainedModel
from lamina.hf.tokenizer import tokenizer_bytes
from lamina.hf.trace import Trace, trace
from lamina.hub import HUB_OPTIONS, local_path, locate, locate_gguf, metadata_folder, remote_headers
from lamina.progress import Progress
from lamina.runtime.schedule import Weights, describe
from lamina.tensors.torch_pickle import read_pickled

Encode = Callable[[PreTrainedModel, Checkpoint, Trace, Weights], Checkpoint]
"""(model, its checkpoint, its trace, its weights) -> the checkpoint that is meant in place of that one"""
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
    if file := _gguf_file(model, hub, chosen, progress, weights_wanted):
        gguf = load_gguf(file, {key: value for key, value in options.items() if key not in hub})
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
