"""What stands between a user and methods of the model that would go around the stream."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from lamina.caller import option
from lamina.errors import StorageError, UnsupportedError
from lamina.hf.names import PreTrainedModel
from lamina.runtime.engine import Engine

NO_GRAPH = "weights that stream, or may come to it, are other tensors in each pass"


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
