"""`model.lamina`: the plan, the statistics and the end of a streamed model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from lamina.fallbacks import Fallbacks
from lamina.hf.decoding.generation import blame
from lamina.hf.names import PreTrainedModel
from lamina.hf.trace import Trace
from lamina.plan.plan import Plan
from lamina.runtime.batches import Batches
from lamina.runtime.draft_stats import Record
from lamina.runtime.engine import Engine
from lamina.runtime.install import eagerly, in_place_of, install
from lamina.runtime.meter import Meter
from lamina.runtime.passes import Passes
from lamina.runtime.stats import Stats

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
        self.fallbacks = Fallbacks()
        self.loading_info: Mapping[str, Any] = {}
        self.record = Record()
        self.decoder: Decoder | None = None  # what stands between a call of `generate` and transformers'
        self._engine = engine
        self._trace = traced
        self._meter = Meter(load_seconds)
        self._batches = Batches(model, engine, traced, self.fallbacks)
        self._passes = Passes(model, engine, traced, self._meter, self._batches)
        self._when_closed: list[Callable[[], None]] = []
        self._closer = weakref.finalize(model, engine.readers.close)  # also when the interpreter ends

    @property
    def plan(self) -> Plan:
        """What lives where."""
        return self._engine.plan

    @property
    def stats(self) -> Stats:
        """Counts and times so far."""
        return self._meter.stats(self._engine, self.record, self.fallbacks)

    def __repr__(self) -> str:
        model, engine = self.model, self._engine
        state = "closed" if engine.readers.closed else f"{self.passes} passes so far"
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

    @property
    def passes(self) -> int:
        """That came to their end."""
        return self._meter.passes

    @property
    def engine(self) -> Engine:
        """What reads and binds the weights."""
        return self._engine

    def give_room(self, nbytes: int) -> None:
        """Let go of weights until so many bytes of the budget are free for a draft.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        self._passes.give_room(nbytes)

    def check_room(self, nbytes: int) -> None:
        """Refuse what `give_room` would refuse, and let go of nothing.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        self._passes.check_room(nbytes)

    def attach(self) -> None:
        """Watch the model's passes and what it generates."""
        model = self.model
        base = model.base_model
        for each in (model,) if base is model else (model, base):  # a hook would not see Ctrl-C
            each.forward = eagerly(in_place_of(each.forward, functools.partial(self._passes.forward, each)))
        install(model, self._engine)
        if hasattr(model, "generate"):
            self._plain_generate = model.generate
            self._settings = model.generation_config.to_dict()
            model.generate = in_place_of(model.generate, self._generate)
        if hasattr(model, "generate_batch"):
            model.generate_batch = in_place_of(model.generate_batch, self._generate_batch)
            model.init_continuous_batching = in_place_of(model.init_continuous_batching, self._batches.start)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, counting the tokens that it gives; stop strings are found with the model's own tokenizer."""
        passes = self.passes
        strings = (kwargs, vars(kwargs.get("generation_config") or self.model.generation_config))
        if any(each.get("stop_strings") for each in strings) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self.model.tokenizer
        try:
            with self._meter.generating():
                if self.decoder is None:
                    out = self._plain_generate(*args, **kwargs)
                else:
                    out = self.decoder(self._plain_generate, args, kwargs)
        except Exception as error:
            blame(self.model, self._settings, error, kwargs, began=passes != self.passes)
            raise
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        sequences = getattr(out, "sequences", out)
        if isinstance(sequences, torch.Tensor):
            length = prompt.shape[-1] if isinstance(prompt, torch.Tensor) else 0
            self._meter.generated(sequences.shape[0] * max(sequences.shape[-1] - length, 0))
        return out

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch`, counting the tokens that it gives."""
        with self._meter.generating():
            out = type(self.model).generate_batch(self.model, *args, **kwargs)
        self._meter.generated(sum(len(answer.generated_tokens) for answer in out.values()))
        return out
