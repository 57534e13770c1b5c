"""Watches one pass on meta tensors: which weights each module's own code touches, and what is alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lamina.hf.experts import picks, routes
from lamina.plan.schedule import Call

_VIEW_PROPERTIES = (torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.mH, torch.Tensor.data)
_RESHAPES = (torch.Tensor.view, torch.Tensor.reshape)


@dataclass
class Node:
    """A running module: what its own code touches, and the modules that it calls."""

    module: str
    touches: list[str] = field(default_factory=list)
    calls: list[Node] = field(default_factory=list)

    def freeze(self) -> Call:
        """The call, as a schedule is made of it."""
        return Call(self.module, tuple(dict.fromkeys(self.touches)), tuple(call.freeze() for call in self.calls))


def weight_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their first name; a tied one appears once."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        found.setdefault(name, buffer)
    return found


def layer_names(model: torch.nn.Module) -> frozenset[str]:
    """Names of the decoder layers: the members of the outermost module lists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    return frozenset(f"{name}.{child}" for name in outer for child, _ in model.get_submodule(name).named_children())


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of results that are alive at once, by their storages: a view keeps all of its own.

    It sits below the functions that a model calls, so that it sees what those make inside, such as the copy in fp32
    that a softmax takes of scores in 16 bits.

    Args:
        apart: tensors that do not count: the weights.
    """

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.history: list[int] = []  # `alive` after each storage that was made
        self.paused = False
        self._apart = [tensor.untyped_storage() for tensor in apart]  # kept, so that no other gets their ids
        self._seen = {id(storage) for storage in self._apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.count(out)
        return out

    def count(self, out: Any) -> None:
        """Count the tensors of a result."""
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.history.append(self.alive)

        def gone() -> None:
            self._seen.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def attention_fuses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether the processor has one kernel for such an attention, which keeps no scores of every row and key.

    It has none where queries have other heads than keys have (falcon's one head) or values another size (DeepSeek's).
    torch is asked with tensors of one row, seen as if they had these shapes.
    """
    given = (query, key, value, *([] if attn_mask is None else [attn_mask]))
    query, key, value, *mask = [torch.empty(t.shape[-1:], dtype=t.dtype, device="cpu").expand(t.shape) for t in given]
    chosen = torch._fused_sdp_choice(
        query, key, value, mask[0] if mask else None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return bool(chosen != SDPBackend.MATH.value)


class Recorder(TorchFunctionMode):
    """Writes down touches by module, and the bytes of results alive at once.

    Args:
        names: of the weights, by id.
        memory: counts beside it.
        answering: answer for the values that meta tensors do not have.
        counts: how many experts a layer may have, where it multiplies with all of them at once.
        mixed: some tensors have values, which are dropped where they meet one without.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        memory: Memory,
        answering: bool = False,
        counts: frozenset[int] = frozenset(),
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.mixed = mixed
        self.names, self.memory, self.answering, self.counts = names, memory, answering, counts
        self.views: dict[int, tuple[str, torch.Tensor]] = {}  # of weights, which may divide them into experts
        self.experts: dict[str, int] = {}
        self.routed: dict[str, int] = {}
        self.picked: dict[str, int] = {}  # by module: experts a token, if its integers are routed ids
        self.last_choice = 0  # of a `topk`
        self.last_router: tuple[str, torch.Tensor] | None = None  # and the ids that it gave
        self.routers: dict[str, str] = {}
        self.root = Node("")
        self.stack = [self.root]
        self.kinds: dict[tuple[str, str], set[str]] = {}  # by module and weight
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name != "__get__" or getattr(func, "__self__", None) in _VIEW_PROPERTIES:
            self.operations += 1
            self._record(func, args, kwargs)
        out = self._run(func, args, kwargs)
        if func in _RESHAPES and id(args[0]) in self.names:
            self.views[id(out)] = self.names[id(args[0])], out
        if name == "topk":
            self.last_choice = int(out[1].shape[-1])
        return out

    def _record(self, func: Any, args: Any, kwargs: Any) -> None:
        """Write down which weights an operation touches, and how."""
        for position, leaf in enumerate(tree_leaves((args, kwargs))):
            if (name := self.names.get(id(leaf))) is not None:
                self._touch(name, _kind(func, position, args, self.counts), leaf)
            elif (seen := self.views.get(id(leaf))) is not None:
                kind = _kind(func, position, args, frozenset())
                self._touch(seen[0], kind if kind == "experts" else "other", leaf)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation's result, made up where it asks for values; attention that has a kernel counts as one."""
        self.memory.paused = True
        if self.mixed:
            args, kwargs = _all_on_meta(func, args, kwargs)
        answer = _VALUES.get(func) if self.answering and not (self.mixed and _has_values(args)) else None
        fused = func is torch.nn.functional.scaled_dot_product_attention and attention_fuses(*args, **kwargs)
        self.memory.paused = fused  # on meta tensors it is always made of products and a softmax
        try:
            out = func(*args, **kwargs) if answer is None else answer(func, args, kwargs)
        finally:
            self.memory.paused = False
        if fused:
            self.memory.count(out)
        return out

    def _touch(self, name: str, kind: str, tensor: torch.Tensor | None = None) -> None:
        node = self.stack[-1]
        node.touches.append(name)
        self.kinds.setdefault((node.module, name), set()).add(kind)
        if kind == "experts" and tensor is not None:
            count = int(tensor.shape[0])
            if self.experts.setdefault(name, count) != count:
                self.kinds[node.module, name].add("other")
            self.routed[node.module] = self.picked.get(node.module, 0) or self.last_choice

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Keep the stack of running modules while the model runs."""
        handles = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def guarding(self, model: torch.nn.Module) -> Iterator[None]:
        """Let a decoder layer, or a module inside one, fail alone.

        It then needs all its weights, and gives its input's shape. Experts that ask for the routed ids, which meta
        tensors do not have, are given some.
        """
        layers = layer_names(model)
        inside = tuple(f"{name}." for name in layers)
        guarded = [module for name, module in model.named_modules() if name in layers or name.startswith(inside)]
        for module in guarded:
            module.forward = self._guard(module, module.forward)
        try:
            yield
        finally:
            for module in guarded:
                del module.forward

    def _guard(self, module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*args: Any, **kwargs: Any) -> Any:
            node, depth = self.stack[-1], len(self.stack)
            values, answers = (*args, *kwargs.values()), self.answering
            ways = {answers, answers or routes(values) or self._holds_experts(module)}
            for self.answering in sorted(ways):
                try:
                    return forward(*args, **kwargs)
                except Exception:
                    del self.stack[depth:]
                    node.calls.clear()
                    node.touches.clear()
                finally:
                    self.answering = answers
            for name in (self.names[id(p)] for p in module.parameters() if id(p) in self.names):
                self._touch(name, "other")
            return torch.empty_like(next(value for value in values if isinstance(value, torch.Tensor)))

        return guard

    def _holds_experts(self, module: torch.nn.Module) -> bool:
        shapes = [parameter.shape for parameter in module.parameters()]
        return any(len(shape) == 3 and shape[0] in self.counts for shape in shapes)

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = picks((*args, *kwargs.values()))
            if ids is not None:
                self.picked[name] = int(ids.shape[-1])
                if self.last_router is not None and self.last_router[1] is ids:
                    self.routers[name] = self.last_router[0]
            node = Node(name)
            self.stack[-1].calls.append(node)
            self.stack.append(node)

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_: torch.nn.Module, args: Any, output: Any) -> None:
            ids = picks(output) if isinstance(output, tuple) else None
            if ids is not None:
                self.last_router = name, ids
            self.stack.pop()

        return leave


def _kind(func: Any, position: int, args: Any, counts: frozenset[int]) -> str:
    """What an operation does with the weight at `position` among its tensors; see `Trace.uses`.

    Where a reshape divides a weight, what is done with the parts tells.
    """
    place, kind = _KINDS.get(func, (1, "linear") if getattr(func, "__name__", "") == "linear" else (None, "other"))
    if position != place:
        return "other"
    return kind if isinstance(kind, str) else kind(args, counts)


def _kind_of_index(args: Any, counts: frozenset[int]) -> str:
    """One number picks an expert; a number in a tuple looks a row up."""
    index = args[1]
    if isinstance(index, torch.Tensor):
        return "experts" if not index.dim() and index.dtype != torch.bool else "other"
    if isinstance(index, tuple):
        return "embedding" if isinstance(index[0], int) else "other"
    return "experts" if isinstance(index, int) else "other"


def _kind_of_batch(args: Any, counts: frozenset[int]) -> str:
    """A product with all experts at once: of a token that goes elsewhere the input is zero."""
    return "experts" if len(args) == 2 and args[1].shape[0] in counts else "other"


_KINDS: Mapping[Any, tuple[int, str | Callable[[Any, frozenset[int]], str]]] = {
    torch.nn.functional.linear: (1, "linear"),
    torch.nn.functional.embedding: (1, "embedding"),
    torch.Tensor.__getitem__: (0, _kind_of_index),
    torch.Tensor.view: (0, "view"),
    torch.Tensor.reshape: (0, "view"),
    torch.bmm: (1, _kind_of_batch),
    torch.Tensor.bmm: (1, _kind_of_batch),
}
"""Of an operation: where among its tensors a weight stands, and what is then done with it; elsewhere it is "other"."""


def _has_values(args: Any) -> bool:
    """Whether the tensor that an operation is of has values."""
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type != "meta"


def _all_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Arguments of an operation of which some tensors have values and some have none: then none has."""
    kinds = {leaf.device.type == "meta" for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    if len(kinds) < 2:
        return args, kwargs
    prepare = _PREPARED.get(func)
    if prepare is not None:
        args, kwargs = prepare(args, kwargs)
    return tree_map(_on_meta, (args, kwargs))


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf


def _picked_by_indices(args: Any, kwargs: Any) -> Any:
    """A mask with values picks as many as it has: by its indices, of which the number is then known."""

    def indices(each: Any) -> tuple[Any, ...]:
        known = isinstance(each, torch.Tensor) and each.device.type != "meta"
        return each.nonzero(as_tuple=True) if known and each.dtype is torch.bool and each.dim() else (each,)

    picked = args[1] if isinstance(args[1], tuple) else (args[1],)
    places = tuple(place for each in picked for place in indices(each))
    return (args[0], places if len(places) > 1 else places[0], *args[2:]), kwargs


def _shaped_like(args: Any, kwargs: Any) -> Any:
    """Of the second only the shape counts."""
    return (args[0], torch.empty((), dtype=args[1].dtype).expand(args[1].shape)), kwargs


def _repeated(args: Any, kwargs: Any) -> Any:
    """Numbers of repeats with values say how large the result is."""
    times = args[1] if len(args) > 1 else kwargs.get("repeats")
    if isinstance(times, torch.Tensor) and times.device.type != "meta":
        kwargs = {**kwargs, "output_size": int(times.sum())}
    return args, kwargs


_PREPARED: Mapping[Any, Callable[[Any, Any], Any]] = {
    torch.Tensor.__getitem__: _picked_by_indices,
    torch.Tensor.__setitem__: _picked_by_indices,
    torch.Tensor.expand_as: _shaped_like,
    torch.Tensor.view_as: _shaped_like,
    torch.Tensor.reshape_as: _shaped_like,
    torch.repeat_interleave: _repeated,
    torch.Tensor.repeat_interleave: _repeated,
}
"""What is taken from arguments with values before they are dropped."""


def _made_up_number(func: Any, args: Any, kwargs: Any) -> Any:
    """A number of a meta tensor: a mask is true, everything else zero."""
    dtype = args[0].dtype
    return True if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0


def _made_up_indices(func: Any, args: Any, kwargs: Any) -> Any:
    """Where a meta tensor is true: everywhere."""
    mask = args[0]
    if len(args) > 1 or set(kwargs) - {"as_tuple"}:  # torch.where that chooses
        return func(*args, **kwargs)
    found = torch.empty(mask.numel(), mask.dim(), dtype=torch.long, device=mask.device)
    return found.unbind(1) if func is torch.where or kwargs.get("as_tuple") else found


def _made_up_choice(func: Any, args: Any, kwargs: Any) -> Any:
    """What a mask picks: everything; what a number picks: the first."""
    x, mask = args
    if isinstance(mask, torch.Tensor) and not mask.ndim and mask.dtype is not torch.bool:
        return func(x, 0)
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or mask.dim() == 0:
        return func(*args, **kwargs)
    return x.new_empty(mask.numel(), *x.shape[mask.dim() :])


def _made_up_parts(func: Any, args: Any, kwargs: Any) -> Any:
    """Parts of made-up sizes: the first is everything."""
    x, sizes, dim = args[0], args[1] if len(args) > 1 else None, kwargs.get("dim", 0)
    if not isinstance(sizes, list) or len(args) > 2 or sum(sizes) == x.shape[dim]:
        return func(*args, **kwargs)
    return func(x, [x.shape[dim], *(0 for _ in sizes[1:])], dim=dim)


_VALUES: Mapping[Any, Callable[[Any, Any, Any], Any]] = {
    torch.Tensor.item: _made_up_number,
    torch.Tensor.__bool__: _made_up_number,
    torch.Tensor.__int__: _made_up_number,
    torch.Tensor.__float__: _made_up_number,
    torch.Tensor.__contains__: lambda func, args, kwargs: False,
    torch.Tensor.tolist: lambda func, args, kwargs: torch.zeros(args[0].shape, dtype=args[0].dtype).tolist(),
    torch.Tensor.nonzero: _made_up_indices,
    torch.nonzero: _made_up_indices,
    torch.where: _made_up_indices,
    torch.Tensor.__getitem__: _made_up_choice,
    torch.Tensor.split: _made_up_parts,
}
