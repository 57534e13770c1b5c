"""Which draft a model has, and what a call of `generate` makes of it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch

from lamina.caller import option
from lamina.errors import RequestError
from lamina.hf.decoding import custom_generate
from lamina.hf.decoding.draft_attention import quicken
from lamina.hf.decoding.exact_rows import covers
from lamina.plan.forecast import compute_seconds
from lamina.plan.plan import Plan
from lamina.plan.speculation import NONE
from lamina.runtime.stats import SpeculationStats
from lamina.speculative.draft import Draft
from lamina.speculative.draft_length import DraftLength, as_a_copy, as_it_says
from lamina.speculative.draft_model import DraftModel
from lamina.speculative.loop import Speculation
from lamina.speculative.model_draft import CopyDraft, ModelDraft
from lamina.speculative.prompt_lookup import Lookup

AUTO, SELF, LOOKUP = "auto", "self", "lookup"
MOST = 31  # tokens of a draft: with the one before them 32 rows, for which there are kernels already
VERIFYING = 6  # bytes for each row and token of the vocabulary: logits as they come, and one race of sampling
ROW_OF_COMPUTE = 0.02  # of the products of a pass, what one more row adds to them
ROW_OF_EXPERTS = 0.7  # of the experts that a token needs, those that the tokens before it in the pass did not
EXACT_ROW = 0.9  # of the products of a pass, where each row has its own: measured, docs/speculation.md

Fits = Callable[[DraftModel], None]
Load = Callable[[str, Fits], DraftModel]
"""(name of a draft, what refuses one that there is no room for, before it is written) -> its model, not read yet"""


def draft_name(draft: str | None) -> str:
    """A draft as it was asked for.

    Raises:
        RequestError: it is no text.
    """
    if draft is None:
        return NONE
    if not isinstance(draft, str) or not draft:
        raise RequestError(f"{option('draft', draft)}: give 'none', 'auto', 'lookup', 'self', or a model")
    return draft


def verifying_bytes(config: Any) -> int:
    """Memory that verifying the longest draft needs in addition to a pass of one token."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (MOST + 1) * int(getattr(text, "vocab_size", 0) or 0) * VERIFYING


def draft_model_bytes(draft_model: DraftModel, name: str, tokens: int, activations: int) -> int:
    """Memory that a draft with a model takes.

    Args:
        tokens: of the context.
        activations: bytes that the target has for its own: the two never run at once.
    """
    own = draft_model.nbytes + draft_model.scratch_bytes
    if name == SELF:
        return own
    return own + draft_model.cache_bytes(tokens) + max(draft_model.activation_bytes(tokens) - activations, 0)


class Speculator:
    """Stands between a call of `generate` and transformers' own.

    Args:
        model: the target.
        default: the draft of calls that name none; `auto` stands for `chosen`.
        chosen: the draft that pays, as far as is known.
        reason: why this one.
        exact: whether a pass over a draft uses the kernels of one row; None: where Lamina chose the draft itself.
        load: builds the model of a draft that a call names; it is not read yet.
    """

    def __init__(self, model: Any, default: str, chosen: str, reason: str, exact: bool | None, load: Load) -> None:
        self.default, self.chosen, self.exact, self._load = default, chosen, exact, load
        self.speculation = model.lamina.speculation = SpeculationStats(draft=chosen, reason=reason)
        self._model = model
        self._drafts: dict[str, tuple[Draft, DraftLength]] = {}
        self._free = threading.Lock()  # a draft follows one text at a time

    def add(self, name: str, draft_model: DraftModel, progress: Any = None) -> None:
        """Read a draft that there is room for."""
        draft_model.load(self._model.lamina.engine, progress)
        quicken(draft_model.model)
        draft = CopyDraft(draft_model.model) if name == SELF else ModelDraft(name, draft_model.model)
        self._drafts[name] = draft, self._length(False, as_a_copy if name == SELF else as_it_says)

    def __call__(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`generate`, with a draft where it may have one."""
        wanted = draft_name(kwargs.pop("draft", self.default))
        given = kwargs.pop("exact", self.exact)
        exact = wanted == AUTO if given is None else bool(given)
        name = self.chosen if wanted == AUTO else wanted
        if name == NONE:
            return generate(*args, **kwargs)
        request = {**_by_name(generate, args), **kwargs}
        why, exact = self._why_plain(request, exact, bool(given))
        if why is None and not self._free.acquire(blocking=False):
            why = "another answer is being drafted"
        if why is not None:
            self._off(wanted, why)
            return generate(**request)
        try:
            draft, length = self._draft(name, exact)
            self.speculation.on(name)
            request, streamer = custom_generate.taken_out(request)
            turn = self._model.lamina.engine.lock
            return generate(
                **request, custom_generate=Speculation(draft, length, self.speculation, exact, streamer, turn)
            )
        finally:
            self._free.release()
            if self.speculation.off_because is not None:
                self._off(wanted, self.speculation.off_because)

    def _why_plain(self, request: dict[str, Any], exact: bool, asked: bool) -> tuple[str | None, bool]:
        """Why a call has no draft, None where it may have one; and whether its passes use the kernels of one row.

        Args:
            exact: they would, wherever there are such kernels.
            asked: exactness was asked for.
        """
        why = custom_generate.why_plain(self._model, request)
        uncovered = covers(self._model) if why is None and exact else None
        if uncovered is None:
            return why, exact
        # in 32 bits two tokens are never so near that rounding decides; where exactness was asked for it is kept
        return uncovered if asked or self._model.dtype != torch.float32 else None, False

    def _off(self, wanted: str, why: str) -> None:
        """A generation goes without its draft: reported where the user asked for the draft."""
        self.speculation.off(why)
        if wanted != AUTO:
            self._model.lamina.fallbacks.say(f"draft {wanted!r} is off: {why}")

    def _draft(self, name: str, exact: bool) -> tuple[Draft, DraftLength]:
        if name in self._drafts:
            return self._drafts[name]
        lamina = self._model.lamina
        budget = lamina.plan.budget
        room = 0 if budget.draft_bytes else verifying_bytes(self._model.config)
        if name == LOOKUP:
            lamina.give_room(room)
            self._drafts[name] = Lookup(), self._length(exact)
            return self._drafts[name]

        def needed(draft_model: DraftModel) -> int:
            return room + draft_model_bytes(draft_model, name, budget.context_tokens, budget.activation_bytes)

        draft_model = self._load(name, lambda meant: lamina.check_room(needed(meant)))
        room = needed(draft_model)
        lamina.give_room(room)
        try:
            self.add(name, draft_model)
        except BaseException:
            lamina.give_room(-room)
            raise
        return self._drafts[name]

    def _length(self, exact: bool, expected: Callable[[float], float] = as_it_says) -> DraftLength:
        plan = self._model.lamina.plan
        return DraftLength(MOST, plan.predicted_seconds_per_token, row_seconds(plan, exact), expected)


def row_seconds(plan: Plan, exact: bool) -> float:
    """What one more token in a pass is expected to cost: experts of its own, and its share of the products.

    While the drive is what a pass waits for, products cost nothing.
    """
    hardware, work = plan.hardware, plan.work
    products = compute_seconds(work, hardware) * (EXACT_ROW if exact else ROW_OF_COMPUTE)
    experts = 0.0
    if plan.expert_count:
        routed = work.expert_bytes / hardware.disk_bytes_per_second
        experts = ROW_OF_EXPERTS * (routed or compute_seconds(work, hardware))
    spare = max(plan.predicted_seconds_per_token - compute_seconds(work, hardware), 0.0) / MOST
    return experts + max(products - spare, 0.0)


def _by_name(generate: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of `generate` by their names."""
    names = [name for name in inspect.signature(generate).parameters if name != "self"]
    return dict(zip(names, args, strict=False))
