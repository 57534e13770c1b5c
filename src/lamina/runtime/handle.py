"""`model.lamina`, and what stands in the place of methods of the model: the plan, the statistics and the end of it."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from lamina.caller import option
from lamina.errors import StorageError, UnsupportedError
from lamina.fallbacks import Fallbacks
from lamina.hf.decoding.custom_generate import blame
from lamina.hf.internals import cache_of
from lamina.hf.names import PreTrainedModel
from lamina.hf.sizing import TOWERS, has_media
from lamina.hf.trace import Trace
from lamina.plan.speculation import NONE, Drafted, Session
from lamina.runtime.batches import Batches
from lamina.runtime.engine import Engine
from lamina.runtime.passes import Passes
from lamina.runtime.stats import Meter, SpeculationStats, Stats

NO_GRAPH = "weights that stream, or may come to it, are other tensors in each pass"
Decoder = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(transformers' generate, arguments, keyword arguments) -> what generate gives"""


class Lamina:
    """What a streamed model has beside what every transformers model has.

    Attributes:
        model: the model this belongs to.
        fallbacks: second ways that were taken, each with its reason.
        drafted: which draft was chosen at load, and why; `speculation` what came of it.
        loading_info: what `output_loading_info=True` gives.

    A context manager, as the model is: `with model.lamina: ...` closes the stream at the end.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine, traced: Trace, load_seconds: float) -> None:
        self.model = model  # a cycle: a model that is dropped without `close` ends with the next garbage collection
        self.fallbacks = Fallbacks()
        self.loading_info: Mapping[str, Any] = {}
        self.drafted = Drafted()
        self.speculation = SpeculationStats()
        self._decoder: Decoder | None = None
        self._decode_later: Callable[[], None] | None = None
        self._engine = engine
        self._trace = traced
        self._meter = Meter(load_seconds)
        self._passes = Passes(model, engine, traced, self._meter, self.fallbacks)
        self._when_closed: list[Callable[[], None]] = []
        self._closer = weakref.finalize(model, engine.readers.close)  # also when the interpreter ends

    @property
    def own_kernels(self) -> bool:
        """Whether products of a few rows are made by Lamina's kernels, in which a row's bits depend on itself alone."""
        return self._passes.own_kernels

    @own_kernels.setter
    def own_kernels(self, wanted: bool) -> None:
        """Take them, or torch's, from the next pass on."""
        self._passes.own_kernels = wanted

    @property
    def plan(self) -> Session:
        """What lives where, and what drafts."""
        return Session.of(self._engine.plan, self.drafted)

    @property
    def stats(self) -> Stats:
        """Counts and times so far."""
        return self._meter.stats(self._engine, self.speculation, self.fallbacks)

    def __repr__(self) -> str:
        model, engine = self.model, self._engine
        state = "closed" if engine.readers.closed else f"{self.passes} passes so far"
        return f"{type(model).__name__} from {model.name_or_path}, on {engine.device}, {state}\n{self.plan}"

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

    @property
    def decoder(self) -> Decoder | None:
        """What stands between a call of `generate` and transformers' own; made when it is first asked for."""
        if self._decoder is None and self._decode_later is not None:
            with self._engine.lock:
                if self._decoder is None:
                    self._decode_later()
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        """Let `decoder` stand there."""
        self._decoder = decoder

    def decode_later(self, attach: Callable[[], None]) -> None:
        """Have `attach`, which sets `decoder`, called when a call of `generate` first names a draft."""
        self._decode_later = attach

    def _decoder_for(self, kwargs: dict[str, Any]) -> Decoder | None:
        """What decodes a call of `generate`; None for transformers itself, from whose arguments ours are taken out."""
        if self._decoder is None and self._decode_later is not None and kwargs.get("draft") in (None, NONE):
            kwargs.pop("draft", None)
            kwargs.pop("exact", None)
            return None
        return self.decoder

    def attach(self) -> None:
        """Watch the model's passes and what it generates."""
        model = self.model
        base = model.base_model
        for each in (model,) if base is model else (model, base):  # a hook would not see Ctrl-C
            each.forward = eagerly(in_place_of(each.forward, functools.partial(self._passes.forward, each)))
            for name in TOWERS:
                if hasattr(each, name):
                    tower = functools.partial(self._passes.tower, each, name)
                    setattr(each, name, in_place_of(getattr(each, name), tower))
        install(model, self._engine)
        if hasattr(model, "generate"):
            self._plain_generate = model.generate
            self._settings = model.generation_config.to_dict()
            model.generate = in_place_of(model.generate, self._generate)
        if hasattr(model, "generate_batch"):
            model.generate_batch = in_place_of(model.generate_batch, self._generate_batch)
            model.init_continuous_batching = in_place_of(model.init_continuous_batching, self._start_batch)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, counting the tokens that it gives; stop strings are found with the model's own tokenizer."""
        passes = self.passes
        strings = (kwargs, vars(kwargs.get("generation_config") or self.model.generation_config))
        if any(each.get("stop_strings") for each in strings) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self.model.tokenizer
        try:
            with self._meter.generating():
                self._spread(args, kwargs)
                decoder = self._decoder_for(kwargs)
                if decoder is None:
                    out = self._plain_generate(*args, **kwargs)
                else:
                    out = decoder(self._plain_generate, args, kwargs)
        except Exception as error:
            blame(self.model, self._settings, error, kwargs, began=passes != self.passes)
            raise
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        sequences = getattr(out, "sequences", out)
        if isinstance(sequences, torch.Tensor):
            length = prompt.shape[-1] if isinstance(prompt, torch.Tensor) else 0
            if getattr(self.model.config, "is_encoder_decoder", False):
                length = 1  # the token that the decoder begins with
            self._meter.generated(sequences.shape[0] * max(sequences.shape[-1] - length, 0))
        return out

    def _spread(self, args: Any, kwargs: dict[str, Any]) -> None:
        """A prompt in chunks and a cache in host memory, where the plan has room for no more and the caller leaves it.

        Changes `kwargs`, the arguments of `generate`.
        """
        budget = self._engine.plan.budget
        given = {**vars(kwargs.get("generation_config") or self.model.generation_config), **kwargs}
        if (
            not budget.chunk_tokens
            or has_media(kwargs)
            or given.get("use_cache") is False
            or cache_of(kwargs) is not None
        ):
            return
        if given.get("prefill_chunk_size") is None:
            kwargs["prefill_chunk_size"] = budget.chunk_tokens
        if budget.cache_layers and given.get("cache_implementation") is None:
            kwargs["cache_implementation"] = "offloaded"

    def _start_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`init_continuous_batching`, with a cache and passes that fit the budget."""
        return self._batches.start(*args, **kwargs)

    @functools.cached_property
    def _batches(self) -> Batches:
        return Batches(self.model, self._engine, self._trace, self.fallbacks, self._passes.batches)

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch`, counting the tokens that it gives."""
        with self._meter.generating():
            out = type(self.model).generate_batch(self.model, *args, **kwargs)
        self._meter.generated(sum(len(answer.generated_tokens) for answer in out.values()))
        return out


def in_place_of(method: Any, replacement: Any) -> Any:
    """A function that stands for a bound method: same name, documentation and signature."""

    @functools.wraps(method)
    def standing(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return standing


def eagerly(forward: Any) -> Any:
    """A forward that torch.compile leaves alone, with everything that it calls."""
    disabled: Any = torch.compiler.disable(forward, reason=NO_GRAPH)  # type: ignore[no-untyped-call]
    return disabled


@functools.cache
def _closing(kind: Any) -> Any:
    """A model's class, of the same name, whose objects are context managers: `with` looks on the class for that."""

    def __enter__(self: Any) -> Any:
        return self

    def __exit__(self: Any, *_: object) -> None:
        self.lamina.close()

    like = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(
        kind.__name__, (kind,), exec_body=lambda body: body.update(like, __enter__=__enter__, __exit__=__exit__)
    )


def install(model: PreTrainedModel, engine: Engine) -> None:
    """Have casts, moves, copies, loading a state dict and compiling answered with the stream in mind.

    And `with model:` close the stream at its end.
    """
    kind: Any = type(model)
    object.__setattr__(model, "__class__", _closing(kind))
    model._apply = in_place_of(model._apply, functools.partial(_apply, model, engine))
    loading = functools.partial(_load_from_state_dict, model, engine)
    model._load_from_state_dict = in_place_of(model._load_from_state_dict, loading)
    model.share_memory = in_place_of(model.share_memory, functools.partial(_share_memory, model))
    model.state_dict = in_place_of(model.state_dict, functools.partial(_state_dict, model, engine))
    model.compile = in_place_of(model.compile, functools.partial(_compile, model))
    model.__deepcopy__ = _copied
    model.__reduce_ex__ = _pickled


def _apply(model: Any, engine: Engine, fn: Any, recurse: bool = True) -> Any:
    """`Module._apply`, which is what `to`, `half`, `cuda` and the like come to.

    Raises:
        UnsupportedError: weights that stream or are packed would be cast or moved.
        BudgetError: what is in memory would no longer fit.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    changed = [parameter for parameter in weights if not _keeps(fn, parameter)]
    bound = [parameter for parameter in changed if getattr(parameter, "home", None) is not None]
    if bound:
        target = _probe(fn, bound[0])
        raise UnsupportedError(
            f"weights that stream or are packed stay {_word(bound[0].dtype)} on {engine.device}: load the model "
            f"again with {option('dtype', _word(target.dtype))}, {option('device', str(target.device))}"
        )
    grown = sum(_probe(fn, p).element_size() * p.numel() - p.numel() * p.element_size() for p in changed)
    if grown > 0:
        engine.spend(grown, without=())
    return type(model)._apply(model, fn, recurse)


def _state_dict(model: Any, engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """`Module.state_dict`, between two passes: what a pass of another thread has bound is overwritten after it."""
    with engine.lock:
        return type(model).state_dict(model, *args, **kwargs)


def _share_memory(model: Any) -> Any:
    """`Module.share_memory`, refused before any weight has moved.

    Raises:
        StorageError: weights that stream or are packed have no memory that another process could see.
    """
    if any(getattr(parameter, "home", None) is not None for parameter in model.parameters()):
        raise StorageError(
            "share_memory needs every weight in memory, and some of this model's stream or are packed: load the model "
            "in each process with a budget of its own, or give enough memory for all weights to stay"
        )
    return type(model).share_memory(model)


def _keeps(fn: Any, parameter: torch.Tensor) -> bool:
    made = _probe(fn, parameter)
    return made.dtype == parameter.dtype and made.device == parameter.device


@functools.cache
def _empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _probe(fn: Any, parameter: torch.Tensor) -> torch.Tensor:
    """What becomes of the dtype and device of a parameter, seen on a tensor without elements."""
    made: torch.Tensor = fn(_empty(parameter.dtype, parameter.device))
    return made


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_from_state_dict(model: Any, engine: Engine, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
    """What `load_state_dict` of the model, or of one around it, begins with: room for what it is about to write.

    Raises:
        BudgetError: there is no room for it; nothing was loaded.
    """
    named = {f"{prefix}{name}": p for name, p in model.named_parameters(remove_duplicate=False)}
    homes = {name: home for name, p in named.items() if (home := getattr(p, "home", None)) is not None}
    new = {homes[n].name for n in homes if n in state_dict and getattr(state_dict[n], "home", None) is not homes[n]}
    engine.overrides.make_room(sorted(new))
    return type(model)._load_from_state_dict(model, state_dict, prefix, *args, **kwargs)


def _compile(model: Any, *args: Any, **kwargs: Any) -> None:
    """`Module.compile`: a model of Lamina runs as it is, for its weights may be other tensors in each pass."""
    model.lamina.fallbacks.say(f"the model runs without torch.compile: {NO_GRAPH}")


def _copied(memo: Any) -> Any:
    raise UnsupportedError("a model of Lamina cannot be copied: load it a second time, with memory of its own")


def _pickled(protocol: Any) -> Any:
    raise UnsupportedError("a model of Lamina cannot be pickled: model.save_pretrained(folder) saves it as it streams")
