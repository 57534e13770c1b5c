"""Continuous batching within the budget: how large a batch may be, and the room that it gets."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch

from lamina.caller import option
from lamina.errors import BudgetError, TokenError
from lamina.fallbacks import Fallbacks
from lamina.hf.decoding.batching import (
    PAGE,
    Need,
    Size,
    config_on_device,
    filled_in,
    need_of,
    room_for_batches,
    shorter,
    size_for,
    size_of,
)
from lamina.hf.internals import managed_already, refuse_alone, when_stopped
from lamina.hf.names import ContinuousBatchingConfig, PreTrainedModel
from lamina.hf.trace import Trace
from lamina.runtime.engine import Engine
from lamina.sizes import format_size, short_size
from lamina.tensors.ids import check_ids, vocabulary_rows

BATCH_SLACK = 16_000_000  # bytes: at its minimum a fresh process stays 100 MB below it (docs/log.md)


class Batches:
    """The continuous batches of one model.

    Args:
        model: answers them.
        engine: binds its weights; its plan leaves the room.
        traced: says what a pass takes.
        fallbacks: where it is said that a batch got less than was asked for.
        sizes: by batch, bytes that it has of the room for caches; written here.
    """

    def __init__(
        self, model: PreTrainedModel, engine: Engine, traced: Trace, fallbacks: Fallbacks, sizes: dict[int, int]
    ) -> None:
        self._model, self._engine, self._trace, self._fallbacks = model, engine, traced, fallbacks
        self._sizes = sizes
        self._lent = 0  # of what every process is given, to batches

    @property
    def nbytes(self) -> int:
        """Bytes that all of them together have of the room for caches."""
        return sum(self._sizes.values())

    def start(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`init_continuous_batching`, with a cache and passes that fit the budget unless the caller says how large.

        Raises:
            BudgetError: not even one request at a time fits.
        """
        plan, model = self._engine.plan, self._model
        cached = managed_already(model)
        if cached or plan.budget.on_device:
            chosen = continuous_batching_config
            if chosen is None and not cached:
                chosen = config_on_device(plan.budget, plan, self._trace)
            return type(model).init_continuous_batching(model, generation_config, chosen, *args, **kwargs)
        said = continuous_batching_config or ContinuousBatchingConfig(page_size=PAGE)
        sampled = getattr(generation_config or model.generation_config, "do_sample", False) or said.return_logprobs
        with self._engine.lock:
            need, chosen = self._room_for(said, bool(sampled))
            size = size_of(chosen)
            manager = type(model).init_continuous_batching(model, generation_config, chosen, *args, **kwargs)
            key = id(manager)
            self._sizes[key] = need.besides_activations(size)
        sizes = self._sizes

        def forget() -> None:
            sizes.pop(key, None)

        when_stopped(manager, forget)
        weakref.finalize(manager, forget)
        refuse_alone(manager, self._wrong, self._too_long, self._shortened)
        return manager

    def _room_for(self, said: Any, sampled: bool) -> tuple[Need, Any]:
        """Room for a batch: what it needs, and the config with the size that it gets.

        Args:
            said: the caller's config, or one that leaves the size open.
            sampled: its answers are sampled, or their probabilities are wanted.

        Raises:
            BudgetError: not even one request at a time fits.
        """
        plan, weights = self._engine.plan, self._engine.schedule.values()
        need = need_of(self._model, plan, weights, self._trace, sampled, said.page_size)
        size = size_for(need, room_for_batches(plan) - self.nbytes, plan.budget.context_tokens)
        chosen = filled_in(said, size)
        try:
            self._set_aside(need, size_of(chosen), asked=said.num_blocks is not None)
        except BudgetError as error:
            least = shorter(need, size, need.of(size) - (error.minimum_bytes - plan.budget.memory_bytes))
            if least is None or size_of(chosen) != size:
                raise
            chosen = filled_in(said, least)
            self._set_aside(need, least)
        return need, chosen

    def _wrong(self, prompt: list[int]) -> TokenError | None:
        rows = vocabulary_rows(self._model)
        try:
            if rows is not None:
                check_ids(torch.tensor(prompt, dtype=torch.int64), rows, "the table of token embeddings")
        except TokenError as error:
            return error
        return None

    def _too_long(self, prompt: int, room: int) -> str:
        given = option("memory", short_size(self._engine.plan.budget.memory_bytes))
        return (
            f"a prompt of {prompt} tokens does not fit: {given} leaves a batch a cache of {room} tokens; give more "
            f"memory, or a larger {option('context')} when the model is loaded"
        )

    def _shortened(self, prompt: int, wanted: int, left: int) -> None:
        self._fallbacks.say(
            f"a request of a batch ends after {left} new tokens in place of {wanted}: the cache has room for "
            f"{prompt + left} tokens in all"
        )

    def _set_aside(self, need: Need, size: Size, asked: bool = False) -> None:
        """Keep room for a batch on top of those that are there; a little more is within what every process is given.

        A cache of a size that was asked for must fit; that its attention does not, when it is full, is said.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        budget = self._engine.plan.budget
        given = option("memory", short_size(budget.memory_bytes))
        wanted = need.of(size) + self.nbytes
        if wanted <= budget.activation_bytes + budget.kv_cache_bytes:
            return
        activations = need.activations(size)
        larger = dataclasses.replace(budget, activation_bytes=activations, kv_cache_bytes=wanted - activations)
        try:
            self._engine.replan(larger)
        except BudgetError as error:
            short = error.minimum_bytes - budget.memory_bytes
            within = self._lent + short <= BATCH_SLACK
            if not within and asked and self._cache_fits(need, size):
                self._fallbacks.say(
                    f"a continuous batch of the size that was asked for may take {format_size(short)} more than "
                    f"{given} when its cache of {size.cache_tokens} tokens is full"
                )
                within = True
            if within:
                self._engine.replan(dataclasses.replace(larger, overhead_bytes=larger.overhead_bytes - short))
                self._lent += short
                return
            raise BudgetError(
                f"{given} is too small for a continuous batch of {size.requests} at "
                f"a time with a cache of {size.cache_tokens} tokens: it needs at least {error.minimum_bytes} bytes "
                f"({format_size(error.minimum_bytes)}); give that much, or a shorter context",
                error.minimum_bytes,
            ) from error

    def _cache_fits(self, need: Need, size: Size) -> bool:
        """Whether a batch's cache alone is within the budget."""
        budget = self._engine.plan.budget
        cache = self.nbytes + need.cache(size)
        try:
            self._engine.plan_for(dataclasses.replace(budget, kv_cache_bytes=max(budget.kv_cache_bytes, cache)))
        except BudgetError as error:
            return error.minimum_bytes - budget.memory_bytes <= BATCH_SLACK
        return True
