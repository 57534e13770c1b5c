"""The story of a pass: it begins, gets room, weights are bound while it computes and released, it ends.

`Passes.a_pass` has it in order. What happens between, module by module, is in the hooks of the engine: a weight is
bound when its module is entered and released when it is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.errors import BudgetError, CheckpointError, LaminaError
from lamina.fallbacks import Fallbacks, cause
from lamina.hf.internals import batched_tokens, by_name, cache_of, cached_tokens
from lamina.hf.names import PreTrainedModel
from lamina.hf.sizing import Sizing
from lamina.hf.trace import Logits, Trace, only_text
from lamina.plan.plan import Budget
from lamina.runtime.engine import Engine
from lamina.runtime.stats import Meter
from lamina.sizes import format_size
from lamina.stream.observe import LAMINA, timed
from lamina.tensors.guard import asking, refused
from lamina.tensors.ids import check_tokens
from lamina.tensors.own_products import own_products
from lamina.tensors.padded_rows import even_rows

GROWTH = 1.5  # of the cache, when it outgrows the plan: so that a long answer replans a few times, not every token


@dataclasses.dataclass(frozen=True)
class Extra:
    """Bytes of a pass that its tokens do not tell.

    Attributes:
        logits: of those beyond the last token's, which alone the trace counted.
        media: the largest set of activations alive at once, with images or sound; 0 without.
    """

    logits: int = 0
    media: int = 0

    def __str__(self) -> str:
        """What an error says of it."""
        said = ""
        if self.media:
            said += f"; {format_size(self.media)} of it are for the images or sound: fewer or smaller ones take less"
        if self.logits:
            said += f"; {format_size(self.logits)} of it are logits: logits_to_keep=1 gives the last token's alone"
        return said


NOTHING = Extra()


class Passes:
    """What surrounds the forward passes of one model.

    Args:
        model: whose passes they are.
        engine: binds its weights.
        traced: says what a pass takes.
        meter: counts them.
        fallbacks: takes what could not be counted.

    Attributes:
        batches: by continuous batch, bytes that it has of the same room.
    """

    def __init__(
        self, model: PreTrainedModel, engine: Engine, traced: Trace, meter: Meter, fallbacks: Fallbacks
    ) -> None:
        self._model, self._engine, self._trace, self._meter = model, engine, traced, meter
        self._fallbacks = fallbacks
        self.own_kernels = False
        self.batches: dict[int, int] = {}
        self._logits, self._sizing = Logits(model), Sizing(model)
        self._activations = functools.lru_cache(maxsize=64)(traced.of_tokens)  # decode steps are of one token each

    @contextmanager
    def a_pass(self, kwargs: dict[str, Any], with_head: bool = True) -> Iterator[None]:
        """What surrounds one forward: one thread at a time, room for its tokens, the stream at its start.

        Args:
            kwargs: what `forward` is given, by name.
            with_head: it gives logits; the model under the head gives none.

        Raises:
            BudgetError: not even the smallest plan has room for its tokens.
        """
        engine = self._engine
        with engine.lock, torch.set_grad_enabled(torch.is_grad_enabled() and not engine.plan.streams):
            # a streamed weight is gone before a backward pass could use it
            try:
                self._meter.began()
                rows, length = _shape(kwargs)
                batched = bool(batched_tokens(kwargs))
                logits = self._logits.of(rows, length, kwargs) if with_head and not batched else 0
                more = Extra(logits, self._sizing.activations(kwargs))
                self._make_room(rows * length, rows * cached_tokens(cache_of(kwargs)), batched, more)
                self._say_uncounted()
                engine.begin_pass()
                with own_products(self.own_kernels), even_rows(rows * length, engine.device, batched):
                    yield  # the model computes: hooks bind and release what streams
                self._meter.ended(engine.experts.counts.nbytes if engine.experts is not None else 0)
            finally:
                self._meter.left()
                engine.end_pass()

    def forward(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`forward` of the model, or of the model under its head, as a pass of the stream."""
        engine = self._engine
        # the whole model is never inside its own pass: what an interrupt left of the one before does not count
        if module is not self._model and self._meter.in_own_pass:  # inside that of the whole model
            return type(module).forward(module, *args, **kwargs)
        args, kwargs = self._on_device(args, kwargs)
        guarded = engine.plan.streams and torch.is_grad_enabled()
        sources = asking(args, kwargs, *module.parameters()) if guarded else []
        try:
            with self.a_pass(by_name(module, args, kwargs), module is self._model):
                out = type(module).forward(module, *args, **kwargs)
        except Exception as error:
            if isinstance(error, IndexError):  # of a table in memory: torch names neither the id nor the table
                check_tokens(self._model, args, kwargs, error)
            self._blame_config(error)
            raise
        if not self._meter.in_generate:
            self._meter.batched(batched_tokens(kwargs))
        return refused(out, sources)

    def tower(self, module: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """A method of the model that runs a tower for images or sound alone, with room for what it takes.

        Args:
            module: the model, or the model under its head.
            name: of the method.

        Raises:
            BudgetError: not even the smallest plan has room for it.
        """
        engine, method = self._engine, functools.partial(getattr(type(module), name), module)
        if engine.in_pass:
            return method(*args, **kwargs)
        args, kwargs = self._on_device(args, kwargs)
        given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
        with engine.lock, torch.set_grad_enabled(torch.is_grad_enabled() and not engine.plan.streams):
            try:
                extra, budget = Extra(media=self._sizing.activations({**given, **kwargs}, name)), engine.plan.budget
                if extra.media > budget.activation_bytes:  # its tokens come later, and their room stays
                    self._replan([dataclasses.replace(budget, activation_bytes=extra.media)], extra)
                self._say_uncounted()
                engine.begin_pass()
                return method(*args, **kwargs)
            finally:
                engine.end_pass()

    def _on_device(self, args: Any, kwargs: Any) -> Any:
        """Arguments where the model computes."""
        device = self._engine.device
        if device.type != "cpu":
            self._engine.binder.check_process()
        return (args, kwargs) if device.type == "cpu" else tree_map(lambda each: _to(each, device), (args, kwargs))

    def _say_uncounted(self) -> None:
        if self._sizing.fallback is not None:
            self._fallbacks.say(self._sizing.fallback)
        self._fallbacks.say(self._engine.binder.fallbacks)

    def _blame_config(self, error: Exception) -> None:
        """Say of the first pass that fails, where one over a single token fails as well, that the config is wrong.

        A model that was traced without values, on any of the second ways, may fail with any.

        Raises:
            CheckpointError: so it is.
        """
        known = isinstance(error, LaminaError | MemoryError) or not only_text(self._model)
        if self._meter.passes or not self._trace.fallbacks or known:
            return
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._engine.device)
        try:
            with torch.no_grad(), self.a_pass({"input_ids": ids}):
                type(self._model).forward(self._model, input_ids=ids)
            self._meter.not_counted()
        except LaminaError:
            return
        except Exception as again:
            where = self._model.config.name_or_path
            raise CheckpointError(
                f"a forward pass of the model in {where} fails with a single token, {cause(again)}: its config is wrong"
            ) from error

    @timed(LAMINA)
    def _make_room(self, tokens: int, cached: int, batched: bool = False, extra: Extra = NOTHING) -> None:
        """Keep the budget when a pass brings more tokens than were planned for: fewer weights stay resident.

        Args:
            extra: what it takes beside its tokens.

        Raises:
            BudgetError: not even the smallest plan has room for them.
        """
        budget = self._engine.plan.budget
        others = sum(self.batches.values())
        activations = max(self._activations(tokens) + extra.logits, extra.media)
        cache = others if batched and others else others + self._trace.cache(cached + tokens)
        if tokens <= budget.chunk_tokens and not extra.media:  # its activations were counted with the keys before it
            activations = min(activations, budget.activation_bytes)
        if budget.has_cache(cache, activations):
            return
        larger = dataclasses.replace(budget, activation_bytes=activations, context_tokens=cached + tokens)
        grown = others + self._trace.cache(int((cached + tokens) * GROWTH))
        self._replan([larger.with_cache(nbytes) for nbytes in (grown, cache)], extra)

    def _replan(self, budgets: Sequence[Budget], extra: Extra) -> None:
        """Go over to a plan for the first of these budgets that there is one for.

        Raises:
            BudgetError: there is none for any.
        """
        *generous, last = budgets
        for budget in generous:
            with contextlib.suppress(BudgetError):
                return self._engine.replan(budget)
        try:
            self._engine.replan(last)
        except BudgetError as error:
            raise BudgetError(f"{error}{extra}", error.minimum_bytes) from None

    def give_room(self, nbytes: int) -> None:
        """Let go of weights until so many bytes of the budget are free for a draft.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        if not nbytes:
            return
        with self._engine.lock:
            self._engine.replan(self._with_draft(nbytes))

    def check_room(self, nbytes: int) -> None:
        """Refuse what `give_room` would refuse, and let go of nothing.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        with self._engine.lock:
            self._engine.plan_for(self._with_draft(nbytes))

    def _with_draft(self, nbytes: int) -> Budget:
        budget = self._engine.plan.budget
        return dataclasses.replace(budget, draft_bytes=budget.draft_bytes + nbytes)


def _shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows of the batch that a pass brings, and tokens of each; both 0 where it does not say."""
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
        return 0, 0
    return ids.shape[0], ids.shape[1]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
