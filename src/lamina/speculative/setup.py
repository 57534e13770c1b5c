"""From the draft that was asked for to the one that a model has: what must be made for it, its room, its reason."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from lamina.caller import option
from lamina.checkpoint.choose import ENDING, split_name
from lamina.errors import (
    BudgetError,
    ChangedError,
    LaminaError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
    WriteError,
)
from lamina.hf.decoding.exact_rows import on_device
from lamina.hf.names import PreTrainedModel
from lamina.hub import ANY_MODEL_OPTIONS, SOURCE_OPTIONS
from lamina.plan.plan import Plan
from lamina.plan.speculation import NONE, Drafted, pays, seconds_with_draft
from lamina.progress import Progress
from lamina.runtime.budget import default_context
from lamina.runtime.load import Described, Encode, plan_described
from lamina.sizes import format_seconds, format_size
from lamina.speculative.decoder import (
    AUTO,
    LOOKUP,
    SELF,
    Fits,
    Speculator,
    draft_model_bytes,
    draft_name,
    row_seconds,
    verifying_bytes,
)
from lamina.speculative.draft_model import DraftModel
from lamina.speculative.vocabulary import check_same_tokens
from lamina.store import as_if_split, check_disk, default_folder, is_store_of, split

COPY = "4bit"  # the store that a copy of the model for drafting is
OTHERS = "8bit"  # the same of another model
NO_TEXT = "the model gives no text, so there is nothing to propose"
LOG = logging.getLogger("lamina")


class Drafting:
    """From the draft that was asked for to the one that a model has.

    Nothing is written before `write`: until then a store that is not there is described as it will be.

    Args:
        draft: as it was asked for.
        model: as it was asked for, before any compression.
        source: where it comes from: those of `SOURCE_OPTIONS`.
        options: of `from_pretrained`, for a copy of the model.
        memory: `memory`, `device_memory` and `context` as they were given.
        weights_wanted: they will be read; else the headers are enough.

    Attributes:
        chosen: the draft to have; `reason` why this one.
        writes: a store for the draft is to be written.
    """

    def __init__(
        self,
        draft: str | None,
        model: str,
        source: dict[str, Any],
        options: dict[str, Any],
        memory: tuple[float | str | None, float | str | None, int | None],
        progress: Progress | None = None,
        weights_wanted: bool = True,
    ) -> None:
        self._weights_wanted = weights_wanted
        self.wanted = self.chosen = draft_name(draft)
        self.reason = "asked for"
        self._model, self._source, self._memory, self._progress = model, source, memory, progress
        self._options = {key: value for key, value in options.items() if key not in SOURCE_OPTIONS}
        self._options["trust_remote_code"] = bool(options.get("trust_remote_code", False))
        self._draft_model: DraftModel | None = None
        self._target: Described | None = None
        self.writes = False
        self._is_gguf = options.get("gguf_file") is not None or model.lower().endswith(ENDING)
        if self.wanted == AUTO:
            self._find_copy()
        elif self.wanted not in (NONE, LOOKUP):
            self._draft_model, self.writes = self._describe(self.wanted)

    def check_disk(self) -> None:
        """Refuse a store that the disk has no room for.

        Raises:
            WriteError: it says how much there is, and what needs less.
        """
        if self.writes and self._draft_model is not None:
            self._check_disk(self.wanted, self._draft_model)

    def write(self) -> None:
        """Write the store that is wanted and not there; path, size and time are announced before."""
        if self.writes:
            self._draft_model, self.writes = self._written(self.wanted), False

    def reserve(self, target: Described, device: torch.device) -> Callable[[int], int]:
        """What the draft takes of the target's memory, for a context of so many tokens."""
        self._target = target
        if not target.model.can_generate():
            self._draft_model, self.writes, self.chosen, self.reason = None, False, NONE, NO_TEXT
        elif self.wanted == AUTO and (why := on_device(device)) is not None:  # `auto` is exact, or there is no draft
            self._draft_model, self.chosen = None, NONE
            self.reason = f"{why}; {option('draft', LOOKUP)} or a copy propose there, verified without that"
        verifying = verifying_bytes(target.model.config)
        if self.chosen == NONE:
            return lambda tokens: 0
        if self._draft_model is None:
            return lambda tokens: verifying
        draft_model, name = self._draft_model, self.chosen
        if name != SELF:
            check_same_tokens(target, draft_model.described, name)

        def also(tokens: int) -> int:
            return verifying + draft_model_bytes(draft_model, name, tokens, target.trace.activations(tokens))

        if self.wanted == AUTO and not self._pays(target, device, also):
            self._draft_model, self.chosen = None, LOOKUP
            return lambda tokens: verifying
        return also

    def drafted(self, plan: Plan) -> Drafted:
        """What was chosen, why, and what it promises under a plan."""
        seconds = None
        if self.chosen == SELF and self._draft_model is not None:
            row = row_seconds(plan, exact=self.wanted == AUTO)
            seconds = seconds_with_draft(plan, self._draft_model.nbytes, plan.operations_per_token, row)
        return Drafted(draft=self.chosen, draft_reason=self.reason, predicted_seconds_per_token_drafted=seconds)

    def attach(self, model: PreTrainedModel, exact: bool | None) -> None:
        """Give the model its draft."""
        model.lamina.drafted = self.drafted(model.lamina.plan)
        if self.chosen == NONE and self.wanted not in (AUTO, NONE):
            model.lamina.fallbacks.say(f"draft {self.wanted!r} is off: {self.reason}")
        speculator = Speculator(model, self.wanted, self.chosen, self.reason, exact, self._load_later)
        if self._draft_model is not None:
            speculator.add(self.chosen, self._draft_model, self._progress)
        model.lamina.decoder = speculator

    def _find_copy(self) -> None:
        """A copy in 4 bits where there is one already; none is written, because the user did not ask for one."""
        self.chosen = LOOKUP
        self.reason = f"no copy of the model in 4 bits is there: {option('draft', SELF)} writes one"
        if self._is_gguf:  # a store beside it is of other weights
            self.reason = "no copy in 4 bits is made of a GGUF file"
            return
        try:
            if self._is_there(SELF):
                self._draft_model, _ = self._describe(SELF)
                self.chosen = SELF
        except LaminaError as error:
            self.reason = f"the copy of the model in 4 bits cannot be used: {error}"

    def _pays(self, target: Described, device: torch.device, also: Callable[[int], int]) -> bool:
        memory, device_memory, context = self._memory
        assert self._draft_model is not None

        def plan(reserve: Callable[[int], int] | None) -> Plan:
            most = default_context(target.model.config)
            return plan_described(target, memory, device_memory, device, context, most, reserve)

        try:
            with_copy = plan(also)
            paying, self.reason = pays(
                plan(None), with_copy, self._draft_model.nbytes, row_seconds(with_copy, exact=True)
            )
        except BudgetError:
            self.reason = f"there is no room for the copy of the model in 4 bits ({format_size(also(1))})"
            return False
        return paying

    @property
    def _folder_options(self) -> dict[str, Any]:
        return {key: value for key, value in self._source.items() if key != "variant"}

    def _describe(self, name: str) -> tuple[DraftModel, bool]:
        """The model of a draft as it is or as it will be, and whether a store of it is to be written for that."""
        if name == SELF and self._is_gguf:
            raise UnsupportedError(
                f"no copy in 4 bits is made of a GGUF file: {option('draft', LOOKUP)} or a smaller model can propose"
            )
        if name == SELF and is_store_of(self._model, COPY):
            raise UnsupportedError(
                f"{self._model} has 4 bits a weight already: a copy of it would be no smaller; "
                f"{option('draft', LOOKUP)} or a smaller model can propose"
            )
        if name != SELF and split_name(name)[1] is not None:
            return self._other(name), False  # a GGUF file
        if self._is_there(name):
            return self._written(name), False
        if name == SELF:
            return self._copy_to_be(), True
        try:
            meant = self._other(name, functools.partial(as_if_split, compression=OTHERS))
            check_disk(self._folder(name), meant.described.checkpoint)
            return meant, self._weights_wanted
        except (UnsupportedError, WriteError):
            return self._other(name), False  # in few bits already, or no room for a store

    def _written(self, name: str) -> DraftModel:
        """The model of a draft, from its store, which is written where it is not there."""
        if name != SELF:
            return self._other(self._in_few_bits(name))
        try:
            folder = split(
                self._model,
                compression=COPY,
                progress=self._progress,
                announce=announced("a copy of the model in 4 bits for drafting"),
                **self._source,
            ).folder
        except WriteError as error:
            raise _advised(error) from error
        return DraftModel(folder, True, self._progress, **self._options)

    def _copy_to_be(self) -> DraftModel:
        encode = functools.partial(as_if_split, compression=COPY)
        options = {**self._options, **self._source}
        try:
            return DraftModel(self._model, True, self._progress, self._weights_wanted, encode, **options)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"no copy in 4 bits can be made for {option('draft', SELF)}: {error}; {option('draft', LOOKUP)} or a "
                f"smaller model can propose"
            ) from error

    def _other(self, model: str, encode: Encode | None = None) -> DraftModel:
        """Another model than the target."""
        options = {**self._hub, "trust_remote_code": self._options["trust_remote_code"]}
        try:
            return DraftModel(model, False, self._progress, self._weights_wanted, encode, **options)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"draft: {error}") from error

    def _in_few_bits(self, name: str) -> str:
        """A store of a draft model in 8 bits, which is half as large and drafts in half the time; else the model."""
        try:
            return split(
                name,
                compression=OTHERS,
                progress=self._progress,
                announce=announced(f"the draft {name} in 8 bits"),
                trust_remote_code=self._options["trust_remote_code"],
                **self._hub,
            ).folder
        except (UnsupportedError, WriteError, ChangedError, RequestError):
            return name  # what is wrong with the model itself is said next

    @property
    def _hub(self) -> dict[str, Any]:
        return {key: self._source[key] for key in ANY_MODEL_OPTIONS if key in self._source}

    def _folder(self, name: str) -> str:
        """Where the store for a draft is, or will be."""
        if name == SELF:
            return default_folder(self._model, COPY, **self._folder_options)
        trust = self._options["trust_remote_code"]
        return default_folder(name, OTHERS, trust_remote_code=trust, **self._hub)

    def _is_there(self, name: str) -> bool:
        try:
            return is_store_of(self._folder(name), COPY if name == SELF else OTHERS)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"draft: {error}" if name != SELF else str(error)) from error

    def _check_disk(self, name: str, meant: DraftModel) -> None:
        try:
            check_disk(self._folder(name), meant.described.checkpoint)
        except WriteError as error:
            raise _advised(error) from error

    def _load_later(self, name: str, fits: Fits) -> DraftModel:
        """A draft that a call of `generate` names."""
        draft_model, writes = self._describe(name)
        assert self._target is not None
        if name != SELF:
            check_same_tokens(self._target, draft_model.described, name)
        if not writes:
            return draft_model
        fits(draft_model)
        self._check_disk(name, draft_model)
        return self._written(name)


def announced(what: str) -> Callable[[str, int, float], None]:
    """Tells the log what is about to be written, where, how large it will be and about how long that takes."""

    def announce(folder: str, nbytes: int, seconds: float) -> None:
        took = format_seconds(max(seconds, 1.0))
        LOG.info("writing %s: %s, %s, about %s", what, folder, format_size(nbytes), took)

    return announce


def _advised(error: WriteError) -> WriteError:
    """The same about a copy for drafting, which has no place but one."""
    return WriteError(
        f"no copy of the model for {option('draft', SELF)} can be written: {error.fact}",
        f"make room there, or take {option('draft', LOOKUP)} or {option('draft', NONE)}, which write nothing",
    )
