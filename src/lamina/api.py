"""`AutoModel`: the one way in. A name and a number of bytes give a transformers model that streams.

What has to be made first is made here, by the packages below: a store where smaller weights are asked for.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

import lamina.measure.bench
import lamina.runtime.load
from lamina.caller import offers, option
from lamina.errors import RequestError, UnsupportedError
from lamina.hf.arguments import ordinarily, sorted_out
from lamina.hf.names import PreTrainedModel
from lamina.hub import SOURCE_OPTIONS
from lamina.plan.plan import Plan
from lamina.plan.speculation import NONE, Drafted, Session
from lamina.progress import Progress
from lamina.runtime.budget import check_options
from lamina.runtime.handle import in_place_of
from lamina.runtime.load import Asked, Described, Encode, check_memory, chosen_gguf, load_model
from lamina.speculative.decoder import AUTO, draft_name
from lamina.speculative.setup import Drafting, announced
from lamina.store import as_if_split, default_folder, is_store_of, split
from lamina.store.save import save_pretrained
from lamina.tensors.own_products import check_kernels

PLAIN = "plain"


class AutoModel:
    """Loads a model of the class that its checkpoint names, inside a memory budget.

    Causal language models, models with images or sound, encoders with decoders, heads for classification, and base
    models: what transformers has a class for.
    """

    def __init__(self) -> None:
        raise RequestError("AutoModel is made with AutoModel.from_pretrained(model)")

    @staticmethod
    @ordinarily
    def from_pretrained(
        model: str,
        *,
        memory: float | str | None = None,
        device_memory: float | str | None = None,
        device: str | torch.device = "auto",
        compression: str | None = None,
        draft: str | None = "auto",
        layer_shards_saving_path: str | None = None,
        hf_token: str | None = None,
        prefetching: bool = True,
        delete_original: bool = False,
        profiling_mode: bool = False,
        context: int | None = None,
        exact: bool | None = None,
        kernels: str | None = None,
        progress: Progress | None = None,
        **transformers_kwargs: Any,
    ) -> PreTrainedModel:
        """A transformers model whose weights stay on disk as far as the memory does not hold them.

        Args:
            model: hub id, local folder, one `.safetensors` file in a folder with its config, or a `.gguf` file. One of
                several GGUF files of a folder or hub id is `org/model:file.gguf`, or by a part of its name
                `org/model:Q4_K_M`; `gguf_file=` says the same.
            memory: most resident memory of the process, in bytes or as text ("4GB", "4GiB"). Default: 90% of
                what is free, seen through cgroup limits.
            device_memory: the same for the accelerator.
            device: "auto" (an accelerator where there is one), "cpu", "cuda", "cuda:1", "mps", "xpu".
            compression: "8bit", "4bit" or "lossless": weights in fewer bytes. On first use they are written as a
                store of their own (`lamina split`), which is used from then on. None: the checkpoint as it is.
            draft: what proposes tokens, so that one pass gives several: "self" (a copy of the model in 4 bits, all in
                memory; written beside the model on first use), "lookup" (what followed the last words before), a
                smaller model with the same tokens, None, or "auto": what the memory allows and what pays, of what is
                there. Each token is the model's own choice, with any proposal. `generate` takes it too.
            layer_shards_saving_path: the folder that the store is made in. Default: beside the model's own folder,
                or in the hub's cache. Without a compression the same numbers are written unit by unit.
            hf_token: token of the hub; the same as transformers' `token`.
            prefetching: read experts that are likely to be routed to before their router has chosen. Reading ahead
                of what every pass needs is always on.
            delete_original: delete the weight files that the store was made from, once it was read back and found
                right. Files in the hub's cache stay.
            profiling_mode: accepted for AirLLM's sake; `model.lamina.stats` always counts.
            context: tokens, prompt and answer together, to keep room for. Default 2048 or what the model takes.
            exact: verify a draft with the kernels that one token alone would have, which costs more: in 16 bits the
                others round otherwise, and where two tokens are nearly as likely the second may come. None: only
                with draft="auto". `generate` takes it too.
            kernels: whose products of up to 64 rows with plain weights: "torch" (the default: the bits of plain
                transformers), "lamina" (a row has the same bits in any company, and the weight is gone through once),
                or "auto" (Lamina's where this processor has instructions for the dtype).
            progress: called with ("download", "split", "verify" or "load", bytes done, bytes in all). Before a store is
                written, the logger "lamina" gets a line (INFO): its folder, its size and about how long it takes.
            transformers_kwargs: those of transformers' `from_pretrained`, with the meaning that they have there:
                `dtype`, `revision`, `cache_dir`, `token`, `trust_remote_code`, `attn_implementation`, `config`,
                `generation_config`, ..., and whatever the model's config takes. What cannot be obeyed is refused.

        Returns:
            The model's own transformers class, in evaluation mode, with `model.lamina`, `model.tokenizer` and
            `model.processor` (which is the tokenizer where there is no other); with `output_loading_info=True` a pair
            of it and transformers' dictionary of missing and unexpected names.

        Raises:
            ModelNotFoundError: no such model.
            BudgetError: the memory is too small; the error carries `minimum_bytes`. No store for a draft was written.
            CheckpointError: the checkpoint is damaged or incomplete.
            RequestError: a wrong argument.
            UnsupportedError: it cannot be streamed.
            WriteError: the store cannot be written.
        """
        asked = Asked(memory, device_memory, device, context, progress, kernels=kernels)
        stored = compression is not None or layer_shards_saving_path is not None or delete_original
        model, asked, options = _sorted(model, asked, transformers_kwargs, hf_token, compression, stored)
        with_info = bool(options.pop("output_loading_info", False))
        source, drafting = _drafting(draft, model, asked, options)
        stored = stored and not is_store_of(model, compression or PLAIN)
        asked = replace(asked, reserve=drafting.reserve)
        if drafting.writes:  # not before the memory is known to be enough for all there will be
            folder, encode = _as_it_will_be(model, compression, source, layer_shards_saving_path)
            check_memory(folder, asked, _for(folder, model, options), encode)
            drafting.check_disk()
        if stored:
            model = _split(model, compression, layer_shards_saving_path, delete_original, progress, source)
            _without(options, "subfolder", "variant")
        drafting.write()
        loaded = load_model(model, asked, options, prefetching=prefetching)
        _complete(loaded, drafting, exact)
        return (loaded, dict(loaded.lamina.loading_info)) if with_info else loaded


def _split(
    model: str,
    compression: str | None,
    path: str | None,
    delete_original: bool,
    progress: Progress | None,
    source: Mapping[str, Any],
) -> str:
    """The folder of the store of a model, written first where it is not there."""
    words = "anew" if compression is None else f"with compression {compression}"
    return split(
        model,
        compression=compression,
        layer_shards_saving_path=path,
        delete_original=delete_original,
        progress=progress,
        announce=announced(f"the model {words}"),
        **source,
    ).folder


def _complete(loaded: PreTrainedModel, drafting: Drafting | _Undrafted, exact: bool | None) -> None:
    """Give a loaded model its way to be saved and its draft; it is closed where that fails."""
    try:
        loaded.save_pretrained = in_place_of(
            loaded.save_pretrained, functools.partial(save_pretrained, loaded.save_pretrained, loaded)
        )
        drafting.attach(loaded, exact)
    except BaseException:
        loaded.lamina.close()
        raise


@ordinarily
def plan_model(
    model: str,
    *,
    memory: float | str | None = None,
    device_memory: float | str | None = None,
    device: str | torch.device = "auto",
    context: int | None = None,
    compression: str | None = None,
    draft: str | None = "auto",
    layer_shards_saving_path: str | None = None,
    hf_token: str | None = None,
    prefetching: bool = True,
    delete_original: bool = False,
    profiling_mode: bool = False,
    exact: bool | None = None,
    kernels: str | None = None,
    progress: Progress | None = None,
    **transformers_kwargs: Any,
) -> Session:
    """What `AutoModel.from_pretrained` would do, from the config and the headers alone.

    For a model on the hub only its small files and the headers of its weight files are fetched.
    Arguments and errors are those of `AutoModel.from_pretrained`; nothing is written, and nothing deleted.

    With a compression, and no store of it yet, it is the plan of the store that would be written; a copy for drafting
    that is not written yet is counted as it will be.
    """
    asked = Asked(memory, device_memory, device, context, progress, kernels=kernels)
    stored = compression is not None or layer_shards_saving_path is not None or delete_original
    model, asked, options = _sorted(model, asked, transformers_kwargs, hf_token, compression, stored)
    options.pop("output_loading_info", None)
    source, drafting = _drafting(draft, model, asked, options, weights_wanted=False)
    folder, encode = _as_it_will_be(model, compression, source, layer_shards_saving_path)
    asked = replace(asked, reserve=drafting.reserve)
    planned = lamina.runtime.load.plan_model(folder, asked, _for(folder, model, options), encode)
    return Session.of(planned, drafting.drafted(planned))


def bench_model(model: str, *, draft: str | None = None, **request: Any) -> dict[str, Any]:
    """See `lamina.measure.bench.bench_model`; takes what `AutoModel.from_pretrained` takes as well.

    Args:
        draft: as there, but nothing proposes tokens unless it is named: what is measured first is a pass.
    """
    draft = NONE if draft_name(draft) == AUTO else draft
    request.pop("output_loading_info", None)
    return lamina.measure.bench.bench_model(model, load=AutoModel.from_pretrained, draft=draft, **request)


def _sorted(
    model: str,
    asked: Asked,
    transformers_kwargs: dict[str, Any],
    hf_token: str | None,
    compression: str | None,
    stored: bool,
) -> tuple[str, Asked, dict[str, Any]]:
    """The name of the model, what is asked of it and the options for transformers, each looked at.

    Args:
        stored: a store of it is asked for.
    """
    model = _named(model)
    check_kernels(asked.kernels)
    given = transformers_kwargs if hf_token is None else {"token": hf_token, **transformers_kwargs}
    options, device, ignored = sorted_out(given, asked.device)
    for name in ignored:  # of `from_pretrained`, which stands in `ordinarily`
        warnings.warn(f"{name} has no meaning here and is ignored", stacklevel=4)
    asked = replace(asked, device=device)
    check_options(
        options,
        memory=asked.memory,
        device_memory=asked.device_memory,
        device=device,
        context=asked.context,
        compression=compression,
    )
    return _gguf_named(model, options, stored), asked, options


def _drafting(
    draft: str | None, model: str, asked: Asked, options: dict[str, Any], weights_wanted: bool = True
) -> tuple[dict[str, Any], Drafting | _Undrafted]:
    """Where the model comes from, and its draft."""
    source = {key: options[key] for key in SOURCE_OPTIONS if options.get(key) is not None}
    memory = (asked.memory, asked.device_memory, asked.context)
    none = draft is None or draft == NONE
    drafting = functools.partial(Drafting, draft, model, source, dict(options), memory, asked.progress, weights_wanted)
    return source, _Undrafted(drafting) if none else drafting()


class _Undrafted:
    """In the place of `Drafting` where nothing drafts, until a call of `generate` names a draft."""

    writes = False
    chosen = Drafted(draft_reason="asked for")

    def __init__(self, drafting: Callable[[], Drafting]) -> None:
        self._drafting = drafting
        self._target: tuple[Described, torch.device] | None = None

    def reserve(self, target: Described, device: torch.device) -> Callable[[int], int]:
        self._target = target, device
        return lambda tokens: 0

    def drafted(self, plan: Plan) -> Drafted:
        return self.chosen

    def check_disk(self) -> None: ...

    def write(self) -> None: ...

    def attach(self, model: PreTrainedModel, exact: bool | None) -> None:
        model.lamina.drafted, model.lamina.speculation.reason = self.chosen, self.chosen.draft_reason
        model.lamina.decode_later(functools.partial(self._attach, model, exact))

    def _attach(self, model: PreTrainedModel, exact: bool | None) -> None:
        assert self._target is not None
        drafting = self._drafting()
        drafting.reserve(*self._target)
        drafting.attach(model, exact)


def _gguf_named(model: str, options: dict[str, Any], stored: bool) -> str:
    """The model without the GGUF file that its name ends with, which is put among the options.

    Raises:
        UnsupportedError: a store of it is asked for.
    """
    model, chosen = chosen_gguf(str(model), options.pop("gguf_file", None))
    if chosen is None:
        return model
    if stored:
        given = ("compression", "layer_shards_saving_path", "delete_original")
        names = [option(name) for name in given if offers(name)]
        raise UnsupportedError(
            f"{chosen} of {model} is small already and streams as it is: leave {' and '.join(names)} out"
        )
    options["gguf_file"] = chosen
    return model


def _as_it_will_be(
    model: str, compression: str | None, source: dict[str, Any], saving_path: str | None = None
) -> tuple[str, Encode | None]:
    """What to open for a model with a compression: its store, or the model and what makes it as if it were one."""
    if compression is None or is_store_of(model, compression):
        return model, None
    options = {key: value for key, value in source.items() if key != "variant"}
    folder = default_folder(model, compression, saving_path, **options)
    if is_store_of(folder, compression):
        return folder, None
    return model, functools.partial(as_if_split, compression=compression)


def _named(model: Any) -> str:
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise RequestError(f"model must be a hub id or a path, got {type(model).__name__} {str(model)[:60]!r}")
    return os.fsdecode(model)


def _for(folder: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options for a store of a model in place of the model itself."""
    return {key: value for key, value in options.items() if folder == model or key not in ("subfolder", "variant")}


def _without(options: dict[str, Any], *names: str) -> None:
    for name in names:
        options.pop(name, None)
