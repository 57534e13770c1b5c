"""From the draft that was asked for to the one that a model has: what must be made for it, its room, its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lamina.decode.speculator import (
    AUTO,
    LOOKUP,
    NONE,
    SELF,
    Speculator,
    companion_bytes,
    draft_name,
    row_seconds,
    verifying_bytes,
)
from lamina.decode.tokens import check_same_tokens
from lamina.errors import (
    BudgetError,
    ChangedError,
    LaminaError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
    WriteError,
)
from lamina.model.auto import Described, plan_described
from lamina.model.budget import default_context
from lamina.model.companion import Companion
from lamina.plan.plan import Plan
from lamina.plan.speculation import pays, seconds_with_draft
from lamina.sizes import format_size
from lamina.store import default_folder, is_store_of, split

Progress = Callable[[str, int, int], None]
SOURCE = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "variant", "trust_remote_code")
HUB = ("cache_dir", "token", "local_files_only")  # of these, what holds for every model
COPY = "4bit"  # the store that a copy of the model for drafting is
OTHERS = "8bit"  # the same of another model
COPY_SHARE = 0.3  # of the model in 16 bits, at the most


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

    def told(self, plan: Plan) -> Plan:
        """The plan with what was chosen, why, and what it promises."""
        seconds = None
        if self.chosen == SELF:
            nbytes = self._companion.nbytes if self._companion is not None else plan.budget.draft_bytes
            row = row_seconds(plan, exact=self.wanted == AUTO)
            seconds = seconds_with_draft(plan, nbytes, plan.operations_per_token, row)
        return replace(plan, draft=self.chosen, draft_reason=self.reason, predicted_seconds_per_token_drafted=seconds)

    def attach(self, model: PreTrainedModel, exact: bool | None) -> None:
        """Give the model its draft."""
        model.lamina.engine.plan = self.told(model.lamina.engine.plan)
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
            beside = plan(also)
            paying, self.reason = pays(plan(None), beside, self._companion.nbytes, row_seconds(beside, exact=True))
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
            try:
                folder = split(self._model, compression=COPY, progress=self._progress, **self._source).folder
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"no copy in 4 bits can be made for draft='self': {error}; draft='lookup' or a smaller model can "
                    f"propose"
                ) from error
            return Companion(folder, True, self._progress, **self._options)
        hub: dict[str, Any] = {key: self._source[key] for key in HUB if key in self._source}
        trust = self._options["trust_remote_code"]
        folder = self._in_few_bits(name, hub) if self._weights_wanted else name
        try:
            return Companion(folder, False, self._progress, self._weights_wanted, trust_remote_code=trust, **hub)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"draft: {error}") from error

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
