"""`AutoModel`: the one way in. A name and a number of bytes give a transformers model that streams.

What has to be made first is made here, by the packages below: a store where smaller weights are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

import lamina.model
from lamina.decode.speculator import (
    AUTO,
    LOOKUP,
    NONE,
    SELF,
    Speculator,
    companion_bytes,
    draft_name,
    verifying_bytes,
)
from lamina.decode.tokens import check_same_tokens
from lamina.errors import BudgetError, ChangedError, LaminaError, RequestError, UnsupportedError, WriteError
from lamina.model.auto import Described, plan_described
from lamina.model.budget import default_context
from lamina.model.companion import Companion
from lamina.plan.plan import Plan
from lamina.plan.speculation import pays
from lamina.sizes import format_size
from lamina.store import as_if_split, default_folder, is_store_of, split

Progress = Callable[[str, int, int], None]
SOURCE = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "variant", "trust_remote_code")
HUB = ("cache_dir", "token", "local_files_only")  # of `SOURCE`, what holds for every model
PLAIN = "plain"
COPY = "4bit"  # the store that a copy of the model for drafting is
OTHERS = "8bit"  # the same of another model
COPY_SHARE = 0.3  # of the model in 16 bits, at the most


class AutoModel:
    """Loads any causal language model that transformers knows, inside a memory budget."""

    def __init__(self) -> None:
        raise RequestError("AutoModel is made with AutoModel.from_pretrained(model)")

    @staticmethod
    def from_pretrained(
        model: str,
        *,
        memory: int | str | None = None,
        device_memory: int | str | None = None,
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
        progress: Progress | None = None,
        **transformers_kwargs: Any,
    ) -> PreTrainedModel:
        """A transformers model whose weights stay on disk as far as the memory does not hold them.

        Args:
            model: hub id, local folder, one `.safetensors` file in a folder with its config, or a `.gguf` file.
            memory: most resident memory of the process, in bytes or as text ("4GB", "4GiB"). Default: 90% of
                what is free, seen through cgroup limits.
            device_memory: the same for the accelerator.
            device: "auto" (an accelerator where there is one), "cpu", "cuda", "cuda:1", "mps", "xpu".
            compression: "8bit", "4bit" or "lossless": weights in fewer bytes. On first use they are written as a
                store of their own (`lamina split`), which is used from then on. None: the checkpoint as it is.
            draft: what proposes tokens, so that one pass gives several: "self" (a copy of the model in 4 bits, all in
                memory; written beside the model on first use), "lookup" (what followed the last words before), a
                smaller model with the same tokens, None, or "auto": what the memory allows and what pays, of what is
                there. Each token is the model's own choice whatever was proposed. `generate` takes it too.
            layer_shards_saving_path: the folder that the store is made in. Default: beside the model's own folder,
                or in the hub's cache. Without a compression the same numbers are written unit by unit.
            hf_token: token of the hub; the same as transformers' `token`.
            prefetching: read experts that are likely to be routed to before their router has spoken. Reading ahead
                of what every pass needs is always on.
            delete_original: delete the weight files that the store was made from, once it was read back and found
                right. Files in the hub's cache stay.
            profiling_mode: accepted for AirLLM's sake; `model.lamina.stats` always counts.
            context: tokens, prompt and answer together, to keep room for. Default 2048 or what the model takes.
            exact: verify a draft with the kernels that one token alone would have, which costs more: in 16 bits the
                others round otherwise, and where two tokens are nearly as likely the second may come. None: only
                with draft="auto". `generate` takes it too.
            progress: told ("download", "split", "verify" or "load", bytes done, bytes in all).
            transformers_kwargs: `dtype`, `revision`, `cache_dir`, `token`, `trust_remote_code`,
                `attn_implementation`, and whatever else the model's config takes.

        Returns:
            The model's own transformers class, in evaluation mode, with `model.lamina` and `model.tokenizer`.

        Raises:
            ModelNotFoundError: no such model.
            BudgetError: the memory is too small; the error carries `minimum_bytes`.
            CheckpointError: the checkpoint is damaged or incomplete.
            RequestError: a wrong argument.
            UnsupportedError: it cannot be streamed.
            WriteError: the store cannot be written.
        """
        if hf_token is not None:
            transformers_kwargs.setdefault("token", hf_token)
        source = {key: transformers_kwargs[key] for key in SOURCE if transformers_kwargs.get(key) is not None}
        drafting = Drafting(draft, model, source, transformers_kwargs, (memory, device_memory, context), progress)
        stored = compression is not None or layer_shards_saving_path is not None or delete_original
        if stored and not is_store_of(model, compression or PLAIN):
            model = split(
                model,
                compression=compression,
                layer_shards_saving_path=layer_shards_saving_path,
                delete_original=delete_original,
                progress=progress,
                **source,
            ).folder
            _without(transformers_kwargs, "subfolder", "variant")
        loaded = lamina.model.load_model(
            model,
            memory=memory,
            device_memory=device_memory,
            device=device,
            prefetching=prefetching,
            context=context,
            progress=progress,
            beside=drafting.beside,
            **transformers_kwargs,
        )
        try:
            drafting.attach(loaded, exact)
        except BaseException:
            loaded.lamina.close()
            raise
        return loaded


def plan_model(
    model: str,
    *,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    device: str | torch.device = "auto",
    context: int | None = None,
    compression: str | None = None,
    draft: str | None = "auto",
    exact: bool | None = None,
    progress: Progress | None = None,
    **transformers_kwargs: Any,
) -> Plan:
    """What `AutoModel.from_pretrained` would do, from the config and the headers alone.

    For a model on the hub only its small files and the headers of its weight files are fetched.
    Arguments and errors are those of `AutoModel.from_pretrained`.

    With a compression, and no store of it yet, it is the plan of the store that would be written; a copy for drafting
    that is not written yet is counted as large as it may become.
    """
    source = {key: transformers_kwargs[key] for key in SOURCE if transformers_kwargs.get(key) is not None}
    drafting = Drafting(draft, model, source, transformers_kwargs, (memory, device_memory, context), progress, False)
    encode = None
    if compression is not None and not is_store_of(model, compression):
        folder = default_folder(model, compression, **{key: source[key] for key in source if key != "variant"})
        if is_store_of(folder, compression):
            model = folder
            _without(transformers_kwargs, "subfolder", "variant")
        else:
            encode = functools.partial(as_if_split, compression=compression)
    return lamina.model.plan_model(
        model,
        memory=memory,
        device_memory=device_memory,
        device=device,
        context=context,
        progress=progress,
        encode=encode,
        beside=drafting.beside,
        **transformers_kwargs,
    )


def bench_model(model: str, *, draft: str | None = None, **request: Any) -> dict[str, Any]:
    """See `lamina.model.bench_model`; takes what `AutoModel.from_pretrained` takes as well.

    Args:
        draft: as there, but nothing proposes tokens unless it is named: what is measured first is a pass.
    """
    draft = NONE if draft_name(draft) == AUTO else draft
    return lamina.model.bench_model(model, load=AutoModel.from_pretrained, draft=draft, **request)


class Drafting:
    """From the draft that was asked for to the one that a model has.

    Args:
        draft: as it was asked for.
        model: as it was asked for, before any compression.
        source: where it comes from: those of `SOURCE`.
        options: of `from_pretrained`, for a copy of the model.
        memory: `memory`, `device_memory` and `context` as they were given.
        weights_wanted: they will be read; else what a draft would take is enough.

    Attributes:
        chosen: the draft to have; `reason` why this one.
    """

    def __init__(
        self,
        draft: str | None,
        model: str,
        source: dict[str, Any],
        options: dict[str, Any],
        memory: tuple[int | str | None, int | str | None, int | None],
        progress: Progress | None = None,
        weights_wanted: bool = True,
    ) -> None:
        self._weights_wanted = weights_wanted
        self.wanted = self.chosen = draft_name(draft)
        self.reason = "asked for"
        self._model, self._source, self._memory, self._progress = model, source, memory, progress
        self._options = {key: value for key, value in options.items() if key not in SOURCE}
        self._options["trust_remote_code"] = bool(options.get("trust_remote_code", False))
        self._companion: Companion | None = None
        self._target: Described | None = None
        if self.wanted == AUTO:
            self._find_copy()
        elif self.wanted not in (NONE, LOOKUP):
            self._companion = self._load(self.wanted)

    def beside(self, target: Described, device: torch.device) -> Callable[[int], int]:
        """What the draft takes of the target's memory, for a context of so many tokens."""
        self._target = target
        verifying = verifying_bytes(target.model.config)
        if self.chosen == NONE:
            return lambda tokens: 0
        if self._companion is None:
            copy = (
                round(COPY_SHARE * 2 * sum(w.elements for w in target.weights.schedule.weights.values()))
                if self.chosen == SELF
                else 0
            )
            return lambda tokens: verifying + copy
        companion, name = self._companion, self.chosen
        if name != SELF:
            check_same_tokens(target, companion.described, name)

        def also(tokens: int) -> int:
            return verifying + companion_bytes(companion, name, tokens, target.trace.activations(tokens))

        if self.wanted == AUTO and not self._pays(target, device, also):
            self._companion, self.chosen = None, LOOKUP
            return lambda tokens: verifying
        return also

    def attach(self, model: PreTrainedModel, exact: bool | None) -> None:
        """Give the model its draft."""
        speculator = Speculator(model, self.wanted, self.chosen, self.reason, exact, self._load_later)
        if self._companion is not None:
            speculator.add(self.chosen, self._companion, self._progress)
        model.lamina.decoder = speculator

    def _find_copy(self) -> None:
        """A copy in 4 bits where there is one already; it is nobody's wish to have one written."""
        self.chosen, self.reason = LOOKUP, "no copy of the model in 4 bits is there: draft='self' writes one"
        try:
            if self._has_copy:
                self._companion = self._load(SELF)
                self.chosen = SELF
        except LaminaError as error:
            self.reason = f"the copy of the model in 4 bits cannot be used: {error}"

    def _pays(self, target: Described, device: torch.device, also: Callable[[int], int]) -> bool:
        memory, device_memory, context = self._memory
        assert self._companion is not None

        def plan(beside: Callable[[int], int] | None) -> Plan:
            most = default_context(target.model.config)
            return plan_described(target, memory, device_memory, device, context, most, beside)

        try:
            paying, self.reason = pays(plan(None), plan(also), self._companion.nbytes)
        except BudgetError:
            self.reason = f"there is no room for the copy of the model in 4 bits ({format_size(also(1))})"
            return False
        return paying

    @property
    def _folder_options(self) -> dict[str, Any]:
        return {key: value for key, value in self._source.items() if key != "variant"}

    def _load(self, name: str) -> Companion | None:
        if name == SELF:
            if is_store_of(self._model, COPY):
                raise UnsupportedError(
                    f"{self._model} has 4 bits a weight already: a copy of it would be no smaller; "
                    f"draft='lookup' or a smaller model can propose"
                )
            if not self._weights_wanted and not self._has_copy:
                return None
            folder = split(self._model, compression=COPY, progress=self._progress, **self._source).folder
            return Companion(folder, True, self._progress, **self._options)
        hub: dict[str, Any] = {key: self._source[key] for key in HUB if key in self._source}
        trust = self._options["trust_remote_code"]
        folder = self._in_few_bits(name, hub) if self._weights_wanted else name
        return Companion(folder, False, self._progress, self._weights_wanted, trust_remote_code=trust, **hub)

    def _in_few_bits(self, name: str, hub: dict[str, Any]) -> str:
        """A store of a draft model in 8 bits, which is half as large and drafts in half the time; else the model."""
        try:
            return split(
                name,
                compression=OTHERS,
                progress=self._progress,
                trust_remote_code=self._options["trust_remote_code"],
                **hub,
            ).folder
        except (UnsupportedError, WriteError, ChangedError, RequestError):
            return name  # in few bits already, or no room for a store: what is wrong with the model itself is said next

    @property
    def _has_copy(self) -> bool:
        return is_store_of(default_folder(self._model, COPY, **self._folder_options), COPY)

    def _load_later(self, name: str) -> Companion:
        """A draft that a call of `generate` names."""
        companion = self._load(name)
        assert self._target is not None and companion is not None
        if name != SELF:
            check_same_tokens(self._target, companion.described, name)
        return companion


def _without(options: dict[str, Any], *names: str) -> None:
    for name in names:
        options.pop(name, None)
