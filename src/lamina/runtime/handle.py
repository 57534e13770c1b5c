"""`model.lamina`: the plan, the statistics and the end of a streamed model."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lamina.caller import option
from lamina.errors import BudgetError, CheckpointError, LaminaError, TokenError
from lamina.fallbacks import Fallbacks, cause
from lamina.hf.batching import (
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
from lamina.hf.internals import (
    batched_tokens,
    cache_of,
    cached_tokens,
    managed_already,
    refuse_alone,
    when_stopped,
)
from lamina.hf.logits import Logits
from lamina.hf.names import ContinuousBatchingConfig, PreTrainedModel
from lamina.hf.settings import blame
from lamina.hf.trace import Trace
from lamina.host import peak_resident_bytes
from lamina.plan.plan import Budget, Plan
from lamina.runtime.draft_stats import Record
from lamina.runtime.engine import Engine
from lamina.runtime.install import eagerly, in_place_of, install
from lamina.runtime.stats import Stats
from lamina.sizes import format_size, short_size
from lamina.stream.experts import Counts
from lamina.tensors.guard import asking, refused
from lamina.tensors.ids import check_ids, check_tokens, vocabulary_rows
from lamina.tensors.padded_rows import even_rows

GROWTH = 1.5  # of the cache, when it outgrows the plan: so that a long answer replans a few times, not every token
BATCH_SLACK = 16_000_000  # bytes: at its minimum a fresh process stays 100 MB below it (docs/log.md)
REMEMBERED = 4096  # passes whose times are kept


Decoder = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(transformers' generate, arguments, keyword arguments) -> what generate gives"""


class Lamina:
    """What a streamed model has beside what every transformers model has.

    Attributes:
        model: the model this belongs to.
        fallbacks: second ways that were taken, each with its reason.
        loading_info: what `output_loading_info=True` gives.

    A context manager, as the model is: `with model.lamina: ...` closes the stream at the end.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine, traced: Trace, load_seconds: float) -> None:
        self.model = model  # a cycle: a model that is dropped without `close` ends with the next garbage collection
        self._engine = engine
        self._trace = traced
        self._load_seconds = load_seconds
        self._passes = self._passes_in_generate = self._new_tokens = 0
        self._seconds_in_passes = self._first_token = 0.0
        self._pass_began: float | None = None
        self._pass_of: int | None = None  # the thread
        self._counting = threading.Lock()  # what several threads count together
        self._generating_now = 0
        self._generate_began: float | None = None
        self._steps: deque[float] = deque(maxlen=REMEMBERED)  # seconds from the end of one pass to the next's
        self._expert_bytes = 0.0  # read in these steps
        self._expert_bytes_before = 0
        self._last_end: float | None = None
        self.fallbacks = Fallbacks()
        self.loading_info: Mapping[str, Any] = {}
        self.record = Record()
        self.decoder: Decoder | None = None  # what stands between a call of `generate` and transformers'
        self._logits = Logits(model)
        self._when_closed: list[Callable[[], None]] = []
        self._batches: dict[int, int] = {}  # bytes that each continuous batch has of the room for caches
        self._lent = 0  # of what every process is given, to batches
        self._closer = weakref.finalize(model, engine.readers.close)  # also when the interpreter ends

    @property
    def plan(self) -> Plan:
        """What lives where."""
        return self._engine.plan

    @property
    def stats(self) -> Stats:
        """Counts and times so far."""
        plan, engine = self._engine.plan, self._engine
        counts = engine.experts.counts if engine.experts is not None else Counts()
        per_pass = self._new_tokens / self._passes_in_generate if self._passes_in_generate else 0.0
        step = statistics.median(self._steps) if self._steps else 0.0
        per_step = max(per_pass, 1.0)
        if self.record.verified and self._steps:  # steps are no longer alike: some give many tokens
            step, per_step = statistics.fmean(self._steps), self.record.tokens / self.record.cycles
        expert_bytes = self._expert_bytes / len(self._steps) if self._steps else 0.0
        read = plan.bytes_streamed_per_pass + expert_bytes
        in_pass = self._pass_began is not None
        done, expected = engine.progress() if in_pass else (0, plan.bytes_read_per_pass)
        return Stats(
            passes=self._passes,
            bytes_read=engine.readers.bytes_read,
            new_tokens=self._new_tokens,
            tokens_per_pass=per_pass,
            seconds_per_token=step / per_step,
            seconds_waiting_for_disk=engine.seconds_waiting,
            seconds_in_passes=self._seconds_in_passes,
            peak_rss_bytes=peak_resident_bytes(),
            memory_budget_bytes=plan.budget.memory_bytes,
            resident_bytes=plan.resident_bytes,
            model_bytes=plan.model_bytes,
            bytes_read_per_pass=plan.bytes_read_per_pass,
            read_bytes_per_second=read / step if step else 0.0,
            load_seconds=self._load_seconds,
            time_to_first_token_seconds=self._first_token,
            pass_bytes_done=done,
            pass_bytes_expected=expected,
            in_pass=in_pass,
            active_bytes_per_token=plan.active_bytes_per_token,
            experts_routed=counts.routed,
            expert_hits=counts.hits,
            experts_foreseen=counts.foreseen,
            expert_misses=counts.misses,
            expert_bytes_read=counts.nbytes,
            expert_hit_rate=counts.hits / counts.routed if counts.routed else plan.hit_rate_without_reading,
            expert_bytes_per_token=expert_bytes / max(per_pass, 1.0),
            expert_tokens={module: tuple(tokens) for module, tokens in counts.tokens.items()},
            draft=self.record.name,
            draft_reason=self.record.said,
            draft_bytes=plan.budget.draft_bytes,
            drafted_tokens=self.record.drafted,
            accepted_tokens=self.record.accepted,
            accepted_by_position=self.record.accepted_by_position,
            draft_share_of_time=self.record.draft_share_of_time,
            fallbacks=tuple(self.fallbacks),
            read_retries=engine.readers.retries,
        )

    def __repr__(self) -> str:
        model, engine = self.model, self._engine
        state = "closed" if engine.readers.closed else f"{self._passes} passes so far"
        return f"{type(model).__name__} from {model.name_or_path}, on {engine.device}, {state}\n{engine.plan}"

    def close(self) -> None:
        """Stop the stream, its threads and files. The model's streamed weights are gone from then on."""
        self._engine.close()  # not by `_closer`: that one acts once, and Ctrl-C may have cut it short
        self._closer.detach()
        for call in self._when_closed:
            call()

    def when_closed(self, call: Callable[[], None]) -> None:
        """Have `call` called at the end of `close`."""
        self._when_closed.append(call)

    def __enter__(self) -> Lamina:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def attach(self) -> None:
        """Watch the model's passes and what it generates."""
        model = self.model
        base = model.base_model
        for each in (model,) if base is model else (model, base):  # a hook would not see Ctrl-C
            each.forward = eagerly(in_place_of(each.forward, functools.partial(self._forward, each)))
        install(model, self._engine)
        if hasattr(model, "generate"):
            self._plain_generate = model.generate
            self._settings = model.generation_config.to_dict()
            model.generate = in_place_of(model.generate, self._generate)
        if hasattr(model, "generate_batch"):
            model.generate_batch = in_place_of(model.generate_batch, self._generate_batch)
            model.init_continuous_batching = in_place_of(model.init_continuous_batching, self._init_batching)

    def _forward(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`forward` of the model, or of the model under its head, as a pass of the stream."""
        engine = self._engine
        # the whole model is never inside its own pass: what an interrupt left of the one before does not count
        if module is not self.model and self._pass_of == threading.get_ident():  # inside that of the whole model
            return type(module).forward(module, *args, **kwargs)
        if engine.device.type != "cpu":
            args, kwargs = tree_map(lambda value: _to(value, engine.device), (args, kwargs))
        guarded = engine.plan.streams and torch.is_grad_enabled()
        sources = asking(args, kwargs, *module.parameters()) if guarded else []
        try:
            with self.a_pass(args, kwargs):
                out = type(module).forward(module, *args, **kwargs)
        except Exception as error:
            if isinstance(error, IndexError):  # of a table in memory: torch names neither the id nor the table
                check_tokens(self.model, args, kwargs, error)
            self._blame_config(error)
            raise
        if self._generate_began is None:
            self._new_tokens += (given := batched_tokens(kwargs))
            self._passes_in_generate += bool(given)
        return refused(out, sources)

    def _blame_config(self, error: Exception) -> None:
        """Say of the first pass that fails, where one over a single token fails as well, that the config is wrong.

        A model that was traced without values, on any of the second ways, may fail with any.

        Raises:
            CheckpointError: so it is.
        """
        if self._passes or not self._trace.fallbacks or isinstance(error, LaminaError | MemoryError):
            return
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._engine.device)
        try:
            with torch.no_grad(), self.a_pass((), {"input_ids": ids}):
                type(self.model).forward(self.model, input_ids=ids)
            self._passes -= 1
        except LaminaError:
            return
        except Exception as again:
            where = self.model.config.name_or_path
            raise CheckpointError(
                f"a forward pass of the model in {where} fails with a single token, {cause(again)}: its config is wrong"
            ) from error

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, counting the tokens that it gives; stop strings are found with the model's own tokenizer."""
        passes = self._passes
        strings = (kwargs, vars(kwargs.get("generation_config") or self.model.generation_config))
        if any(each.get("stop_strings") for each in strings) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self.model.tokenizer
        try:
            with self._generating():
                if self.decoder is None:
                    out = self._plain_generate(*args, **kwargs)
                else:
                    out = self.decoder(self._plain_generate, args, kwargs)
        except Exception as error:
            blame(self.model, self._settings, error, kwargs, began=passes != self._passes)
            raise
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        sequences = getattr(out, "sequences", out)
        if isinstance(sequences, torch.Tensor):
            length = prompt.shape[-1] if isinstance(prompt, torch.Tensor) else 0
            self._new_tokens += sequences.shape[0] * max(sequences.shape[-1] - length, 0)
        return out

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch`, counting the tokens that it gives."""
        with self._generating():
            out = type(self.model).generate_batch(self.model, *args, **kwargs)
        self._new_tokens += sum(len(answer.generated_tokens) for answer in out.values())
        return out

    def _init_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`init_continuous_batching`, with a cache and passes that fit the budget unless the caller says how large.

        Raises:
            BudgetError: not even one request at a time fits.
        """
        plan, model = self.plan, self.model
        cached = managed_already(model)
        if cached or plan.budget.on_device:
            chosen = continuous_batching_config
            if chosen is None and not cached:
                chosen = config_on_device(plan.budget, plan, self._trace)
            return type(model).init_continuous_batching(model, generation_config, chosen, *args, **kwargs)
        said = continuous_batching_config or ContinuousBatchingConfig(page_size=PAGE)
        sampled = getattr(generation_config or model.generation_config, "do_sample", False) or said.return_logprobs
        with self._engine.lock:
            plan = self.plan
            weights = self._engine.schedule.values()
            need = need_of(model, plan, weights, self._trace, bool(sampled), said.page_size)
            room = room_for_batches(plan) - sum(self._batches.values())
            size = size_for(need, room, plan.budget.context_tokens)
            chosen = filled_in(said, size)
            try:
                self._set_aside(need, size_of(chosen), asked=said.num_blocks is not None)
            except BudgetError as error:
                least = shorter(need, size, need.of(size) - (error.minimum_bytes - plan.budget.memory_bytes))
                if least is None or size_of(chosen) != size:
                    raise
                chosen = filled_in(said, least)
                self._set_aside(need, least)
            size = size_of(chosen)
            manager = type(model).init_continuous_batching(model, generation_config, chosen, *args, **kwargs)
            key = id(manager)
            self._batches[key] = need.beside(size)
        batches = self._batches

        def forget() -> None:
            batches.pop(key, None)

        when_stopped(manager, forget)
        weakref.finalize(manager, forget)
        refuse_alone(manager, self._wrong, self._too_long, self._shortened)
        return manager

    def _wrong(self, prompt: list[int]) -> TokenError | None:
        rows = vocabulary_rows(self.model)
        try:
            if rows is not None:
                check_ids(torch.tensor(prompt, dtype=torch.int64), rows, "the table of token embeddings")
        except TokenError as error:
            return error
        return None

    def _too_long(self, prompt: int, room: int) -> str:
        given = option("memory", short_size(self.plan.budget.memory_bytes))
        return (
            f"a prompt of {prompt} tokens does not fit: {given} leaves a batch a cache of {room} tokens; give more "
            f"memory, or a larger {option('context')} when the model is loaded"
        )

    def _shortened(self, prompt: int, wanted: int, left: int) -> None:
        self.fallbacks.say(
            f"a request of a batch ends after {left} new tokens in place of {wanted}: the cache has room for "
            f"{prompt + left} tokens in all"
        )

    def _set_aside(self, need: Need, size: Size, asked: bool = False) -> None:
        """Keep room for a batch on top of those that are there; a little more is within what every process is given.

        A cache of a size that was asked for must fit; that its attention does not, when it is full, is said.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        budget = self.plan.budget
        given = option("memory", short_size(budget.memory_bytes))
        wanted = need.of(size) + sum(self._batches.values())
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
                self.fallbacks.say(
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
        budget = self.plan.budget
        cache = sum(self._batches.values()) + need.cache(size)
        try:
            self._engine.plan_for(dataclasses.replace(budget, kv_cache_bytes=max(budget.kv_cache_bytes, cache)))
        except BudgetError as error:
            return error.minimum_bytes - budget.memory_bytes <= BATCH_SLACK
        return True

    @contextmanager
    def _generating(self) -> Iterator[None]:
        with self._counting:
            if not self._generating_now:
                self._generate_began, self._last_end = time.perf_counter(), None
            self._generating_now += 1
        try:
            yield
        finally:
            with self._counting:
                self._generating_now -= 1
                if not self._generating_now:
                    self._generate_began = self._last_end = None

    @contextmanager
    def a_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """What surrounds one forward: one thread at a time, room for its tokens, the stream at its start."""
        engine = self._engine
        with engine.lock, torch.set_grad_enabled(torch.is_grad_enabled() and not engine.plan.streams):
            # a streamed weight is gone before a backward pass could use it
            try:
                self._pass_began, self._pass_of = time.perf_counter(), threading.get_ident()
                tokens, cached = _tokens(args, kwargs)
                batched = bool(batched_tokens(kwargs))
                logits = 0 if batched else self._logits.of(tokens, args, kwargs)
                self._make_room(tokens, cached, batched, logits)
                engine.begin_pass()
                with even_rows(tokens, engine.device, batched):
                    yield
                self._ended()
            finally:
                self._pass_began = self._pass_of = None
                engine.end_pass()

    @property
    def passes(self) -> int:
        """That came to their end."""
        return self._passes

    @property
    def engine(self) -> Engine:
        """What reads and binds the weights."""
        return self._engine

    def give_room(self, nbytes: int) -> None:
        """Let go of weights until so many bytes of the budget are free for a draft.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        if not nbytes:
            return
        engine = self._engine
        with engine.lock:
            engine.replan(self._with_draft(nbytes))

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

    def _make_room(self, tokens: int, cached: int, batched: bool = False, logits: int = 0) -> None:
        """Keep the budget when a pass brings more tokens than were planned for: fewer weights stay resident.

        Args:
            logits: bytes of those beyond the last token's, which alone the trace counted.

        Raises:
            BudgetError: not even the smallest plan has room for them.
        """
        budget = self._engine.plan.budget
        others = sum(self._batches.values())
        activations = self._trace.activations(tokens) + logits
        cache = others if batched and others else others + self._trace.cache(cached + tokens)
        if activations + cache <= budget.activation_bytes + budget.kv_cache_bytes:
            return
        grown = others + self._trace.cache(int((cached + tokens) * GROWTH))
        for wanted in (grown, cache):
            larger = dataclasses.replace(
                budget, activation_bytes=activations, kv_cache_bytes=wanted, context_tokens=cached + tokens
            )
            try:
                self._engine.replan(larger)
                return
            except BudgetError as error:
                if wanted != cache:
                    continue
                if not logits:
                    raise
                raise BudgetError(
                    f"{error}; {format_size(logits)} of it are logits: logits_to_keep=1 gives the last token's alone",
                    error.minimum_bytes,
                ) from None

    def _ended(self) -> None:
        assert self._pass_began is not None
        now = time.perf_counter()
        experts = self._engine.experts.counts.nbytes if self._engine.experts is not None else 0
        self._seconds_in_passes += now - self._pass_began
        self._passes += 1
        began, before = self._generate_began, self._last_end  # another thread's answer may end meanwhile
        if began is not None:
            self._passes_in_generate += 1
            if before is None:
                self._first_token = now - began
            else:
                if len(self._steps) == REMEMBERED:
                    self._expert_bytes *= 1 - 1 / REMEMBERED
                self._steps.append(now - before)
                self._expert_bytes += experts - self._expert_bytes_before
        self._last_end, self._expert_bytes_before = now, experts


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Tokens that a pass brings, and tokens that are in its cache already, all rows of the batch together."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
        return 0, 0
    return ids.shape[0] * ids.shape[1], ids.shape[0] * cached_tokens(cache_of(kwargs))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
