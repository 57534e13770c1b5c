"""The schedule of a pass, derived by running the model once on the meta device.

A torch-function mode sees which parameter each operation touches, hooks tell which module is running:
together they give the calls of a pass, in order, with the weights that each one's own code needs. Nothing
is computed and nothing is guessed from names. Where a family cannot run on meta tensors the order of
definition stands in; the stream then serves what comes out of order on demand.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from lamina.fallbacks import cause
from lamina.hf.experts import experts_by_config, picks, routes, standing_in
from lamina.hf.internals import arguments_of, cache_argument, cache_of
from lamina.plan.schedule import Call

_VIEW_PROPERTIES = (torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.mH, torch.Tensor.data)
WORKSPACE = 1.25  # kernels' workspaces and what the allocator keeps (docs/log.md)
LENGTHS = (16, 32, 64)  # tokens of the traced prefills: enough to fit a + b T + c T^2
# (guarded, answering) where code asks for values: as it is, failing modules stubbed, values made up, both
_WAYS_ROUND = ((False, False), (True, False), (False, True), (True, True))
_OF_META = ("meta", "DataDependent", "data-dependent", "data dependent", "item()", "FakeTensor")
_RESHAPES = (torch.Tensor.view, torch.Tensor.reshape)


@dataclass
class _Node:
    module: str
    touches: list[str] = field(default_factory=list)
    calls: list[_Node] = field(default_factory=list)

    def freeze(self) -> Call:
        return Call(self.module, tuple(dict.fromkeys(self.touches)), tuple(call.freeze() for call in self.calls))


@dataclass(frozen=True)
class Trace:
    """What one pass does.

    Attributes:
        root: the calls, in order.
        uses: for each weight the kinds of operation that touch it: "linear", "embedding", "experts", "other".
        lookups: (module, weight) where the module's own code only looks rows of the weight up.
        activation_bytes: for each traced length, the most bytes of activations alive at once.
        moments: bytes alive at a moment of the pass, for each traced length; of the moments those which may be the
            largest at some other length. At few tokens an MLP takes most, at many the scores of attention.
        cache_bytes: for each traced length, bytes of the key-value cache after it.
        experts: how many experts a weight holds, where it is used one expert at a time.
        routed: how many experts of a module a token is sent to.
        routers: by experts module, the module that says where tokens go, where one does it alone.
        traced: False for the order of definition.
        fallbacks: second ways that were taken, each with its reason.
        operations: of torch in a pass, the experts' own left out.
    """

    root: Call
    uses: Mapping[str, frozenset[str]]
    lookups: frozenset[tuple[str, str]] = frozenset()
    activation_bytes: Mapping[int, int] = field(default_factory=dict)
    cache_bytes: Mapping[int, int] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)
    routed: Mapping[str, int] = field(default_factory=dict)
    routers: Mapping[str, str] = field(default_factory=dict)
    traced: bool = True
    fallbacks: tuple[str, ...] = ()
    operations: int = 0
    moments: tuple[tuple[int, ...], ...] = ()

    def activations(self, tokens: int) -> int:
        """Bytes of activations and kernels' workspaces for a prefill of `tokens`, from the traced lengths."""
        lengths = sorted(self.activation_bytes)
        points = (self.activation_bytes, *(dict(zip(lengths, moment, strict=True)) for moment in self.moments))
        return int(WORKSPACE * max(_extrapolate(each, tokens) for each in points))

    def cache(self, tokens: int) -> int:
        """Bytes of the key-value cache after `tokens`."""
        return _extrapolate(self.cache_bytes, tokens)


def trace(model: PreTrainedModel) -> Trace:
    """Trace one prefill of `model`.

    Args:
        model: built and attached to a checkpoint; its parameters may have no memory.

    Raises:
        Exception: what the model's own code raises, where it does so however it is called with a cache and tensors
            without values are not the reason.
    """
    failure: Exception | None = None
    excused = False
    activations: dict[int, int] = {}
    caches: dict[int, int] = {}
    alive: dict[int, list[int]] = {}
    recorder = None
    for (guarded, answering), (kind, inputs) in itertools.product(_WAYS_ROUND, _ways_in(model)):
        if (guarded or answering) and failure is not None and not excused:
            raise failure  # as generation calls it, and no value was asked for: it will fail with values, too
        try:
            for tokens in LENGTHS:
                recorder, cache_bytes = _run(model, tokens, inputs, guarded, answering)
                # the cache is among what is alive at the end, and counted on its own
                activations[tokens] = max(recorder.memory.peak - cache_bytes, recorder.memory.peak // 4)
                caches[tokens] = cache_bytes
                alive[tokens] = [max(nbytes - cache_bytes, 0) for nbytes in recorder.memory.history]
        except Exception as error:  # any family may refuse meta tensors in its own way
            failure = failure or error
            # generation gives a cache to whatever takes one: what fails without says nothing
            excused = excused or (_excuses(error) and (kind is not _Cache.NONE or cache_argument(model) is None))
            continue
        if kind is _Cache.NONE and cache_argument(model) is not None:
            caches = {tokens: cache_by_config(model.config, tokens) for tokens in LENGTHS}
        assert recorder is not None
        return Trace(
            recorder.root.freeze(), *_uses(recorder.kinds), activations, caches,
            recorder.experts, recorder.routed, recorder.routers, operations=recorder.operations,
            fallbacks=_second_ways(model, kind, guarded, answering, failure), moments=_moments(alive),
        )  # fmt: skip
    assert failure is not None
    return _by_definition(model, failure)


def _excuses(error: Exception) -> bool:
    """Whether a failure may come of tensors that have no values, or of an input that is missing, and not of shapes.

    Shapes are as they will be with real values.
    """
    seen = " ".join(f"{type(each).__name__} {each}" for each in (error, error.__cause__, error.__context__) if each)
    missing = isinstance(error, NotImplementedError | TypeError | AttributeError)
    return missing or any(word in seen for word in _OF_META)


class _Cache(Enum):
    """Where the cache of a traced pass comes from."""

    GIVEN = "a DynamicCache is given, as generation gives it"
    OWN = "the model makes one, of its own kind"
    NONE = "there is none"


def _second_ways(
    model: PreTrainedModel, kind: _Cache, guarded: bool, answering: bool, failure: Exception | None
) -> tuple[str, ...]:
    """What was traced otherwise than with a cache on plain meta tensors, with the error that closed that way."""
    if failure is None:
        return ()
    why, ways = cause(failure), []
    if cache_argument(model) is not None and kind is _Cache.OWN:
        ways.append(f"the KV cache is of the model's own kind and counted as a traced pass leaves it ({why})")
    if cache_argument(model) is not None and kind is _Cache.NONE:
        ways.append(f"the pass was traced without a KV cache, which is counted from the config instead ({why})")
    if guarded:
        ways.append(f"layers that ask for real numbers were traced with made-up ones, or as one piece each ({why})")
    elif answering:
        ways.append(f"the pass was traced with made-up numbers where the model asks for real ones ({why})")
    return tuple(ways)


def cache_by_config(config: Any, tokens: int) -> int:
    """Bytes of a key-value cache as a config tells: every layer keeps keys and values of every token."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str) -> int:
        return next((int(value) for name in names if isinstance(value := getattr(text, name, None), int)), 0)

    heads = number("num_attention_heads", "n_head", "n_heads")
    size = number("head_dim") or number("hidden_size", "n_embd", "d_model") // max(heads, 1)
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return 2 * layers * (number("num_key_value_heads") or heads) * size * itemsize * tokens


def _uses(kinds: Mapping[tuple[str, str], set[str]]) -> tuple[dict[str, frozenset[str]], frozenset[tuple[str, str]]]:
    """`uses` and `lookups` of a trace, from the kinds of operation by module and weight."""
    uses: dict[str, frozenset[str]] = {}
    for (_, name), own in kinds.items():
        uses[name] = uses.get(name, frozenset()) | (own - {"view"} or {"other"})
    return uses, frozenset(key for key, own in kinds.items() if own == {"embedding"})


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


def _ways_in(model: PreTrainedModel) -> Iterator[tuple[_Cache, Callable[[int], dict[str, Any]]]]:
    """Inputs to try, from what generation passes to the barest."""
    config = model.config
    accepted, cache = arguments_of(model), cache_argument(model)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def ids(tokens: int) -> torch.Tensor:
        return torch.zeros(1, tokens, dtype=torch.long, device="meta")

    def cached(tokens: int) -> dict[str, Any]:
        return {
            "input_ids": ids(tokens),
            str(cache): DynamicCache(config=config),
            "use_cache": True,
            **last_only,
        }

    def positioned(tokens: int) -> dict[str, Any]:
        positions = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        return {**cached(tokens), "position_ids": positions}

    def bare(tokens: int) -> dict[str, Any]:
        return {"input_ids": ids(tokens), "use_cache": False}

    def masked(tokens: int) -> dict[str, Any]:
        return {**bare(tokens), "attention_mask": torch.ones(1, tokens, dtype=torch.long, device="meta")}

    if cache is not None:
        yield _Cache.GIVEN, cached
        if "position_ids" in accepted:
            yield _Cache.GIVEN, positioned
        yield _Cache.OWN, lambda tokens: {"input_ids": ids(tokens), "use_cache": True, **last_only}
    yield _Cache.NONE, bare
    yield _Cache.NONE, masked
    yield _Cache.NONE, lambda tokens: {"input_ids": ids(tokens)}


def _run(
    model: PreTrainedModel,
    tokens: int,
    way: Callable[[int], dict[str, Any]],
    guarded: bool = False,
    answering: bool = False,
) -> tuple[_Recorder, int]:
    """One forward on meta tensors; the recorder that watched it and the bytes of its cache."""
    named = weight_names(model)
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in named.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    recorder = _Recorder(names, _Memory(tensors.values()), answering, experts_by_config(model.config))
    inputs = way(tokens)
    inside = recorder.guarding(model) if guarded else nullcontext()
    with torch.no_grad(), standing_in(model), recorder.watching(model), inside, recorder.memory, recorder:
        outputs = torch.func.functional_call(model, tensors, kwargs=inputs)
    cache = cache_of(inputs) or (cache_of(outputs) if isinstance(outputs, Mapping) else None)
    return recorder, sum(_nbytes(leaf) for leaf in _tensors_of(cache)) if cache is not None else 0


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


class _Recorder(TorchFunctionMode):
    """Writes down touches by module, and the bytes of results alive at once.

    Args:
        names: of the weights, by id.
        memory: counts beside it.
        answering: answer for the values that meta tensors do not have.
        counts: how many experts a layer may have, where it multiplies with all of them at once.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        memory: _Memory,
        answering: bool = False,
        counts: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.names, self.memory, self.answering, self.counts = names, memory, answering, counts
        self.views: dict[int, tuple[str, torch.Tensor]] = {}  # of weights, which may divide them into experts
        self.experts: dict[str, int] = {}
        self.routed: dict[str, int] = {}
        self.picked: dict[str, int] = {}  # by module: experts a token, if its integers are routed ids
        self.last_choice = 0  # of a `topk`
        self.last_router: tuple[str, torch.Tensor] | None = None  # and the ids that it gave
        self.routers: dict[str, str] = {}
        self.root = _Node("")
        self.stack = [self.root]
        self.kinds: dict[tuple[str, str], set[str]] = {}  # by module and weight
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__" or getattr(func, "__self__", None) in _VIEW_PROPERTIES:
            self.operations += 1
            for position, leaf in enumerate(tree_leaves((args, kwargs))):
                if (name := self.names.get(id(leaf))) is not None:
                    self._touch(name, _kind(func, position, args, self.counts), leaf)
                elif (seen := self.views.get(id(leaf))) is not None:
                    kind = _kind(func, position, args, frozenset())
                    self._touch(seen[0], kind if kind == "experts" else "other", leaf)
        answer = _VALUES.get(func) if self.answering else None
        self.memory.paused = True
        fused = func is torch.nn.functional.scaled_dot_product_attention and attention_fuses(*args, **kwargs)
        self.memory.paused = fused  # on meta tensors it is always made of products and a softmax
        try:
            out = func(*args, **kwargs) if answer is None else answer(func, args, kwargs)
        finally:
            self.memory.paused = False
        if fused:
            self.memory.count(out)
        if func in _RESHAPES and id(args[0]) in self.names:
            self.views[id(out)] = self.names[id(args[0])], out
        if getattr(func, "__name__", "") == "topk":
            self.last_choice = int(out[1].shape[-1])
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
            node = _Node(name)
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
    if func is torch.nn.functional.linear or getattr(func, "__name__", "") == "linear":
        return "linear" if position == 1 else "other"
    if func is torch.nn.functional.embedding:
        return "embedding" if position == 1 else "other"
    if func is torch.Tensor.__getitem__ and position == 0:
        index = args[1]
        if isinstance(index, int) or (
            isinstance(index, torch.Tensor) and not index.dim() and index.dtype != torch.bool
        ):
            return "experts"
        if isinstance(index, tuple) and isinstance(index[0], int):
            return "embedding"
    if func in _RESHAPES and position == 0:
        return "view"
    if func in (torch.bmm, torch.Tensor.bmm) and position == 1 and len(args) == 2 and args[1].shape[0] in counts:
        return "experts"  # of a token that goes elsewhere the input is zero
    return "other"


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


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_of(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Tensors reachable from a cache object, each once."""
    seen: set[int] = set()

    def visit(node: Any, left: int) -> Iterator[torch.Tensor]:
        if id(node) in seen or left < 0:
            return
        seen.add(id(node))
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, Mapping):
            for item in node.values():
                yield from visit(item, left - 1)
        elif isinstance(node, list | tuple):
            for item in node:
                yield from visit(item, left - 1)
        elif hasattr(node, "__dict__"):
            yield from visit(vars(node), left - 1)

    return visit(value, depth + 2)


def _moments(alive: Mapping[int, Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The moments that no other exceeds in value, slope and curve; none where the lengths took other steps each."""
    if len(alive) != len(LENGTHS) or len({len(each) for each in alive.values()}) > 1:
        return ()
    kept: list[tuple[int, ...]] = []
    for moment in sorted(set(zip(*(alive[tokens] for tokens in LENGTHS), strict=True)), key=lambda each: -each[2]):
        if not any(all(a >= b for a, b in zip(_shape(other), _shape(moment), strict=True)) for other in kept):
            kept.append(moment)
    return tuple(kept)


def _shape(moment: tuple[int, ...]) -> tuple[float, float, float]:
    """Value at the longest traced length, slope there, curve."""
    (x0, x1, x2), (y0, y1, y2) = LENGTHS, moment
    slope01, slope12 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return y2, slope12, (slope12 - slope01) / (x2 - x0)


def _extrapolate(points: Mapping[int, int], tokens: int) -> int:
    """Value at `tokens`, which never falls as they grow.

    Within the traced lengths that of the next one; beyond them on the parabola through them, never less than
    on a straight line.
    """
    if not points:
        return 0
    lengths = sorted(points)
    values = list(itertools.accumulate((points[length] for length in lengths), max))
    if tokens <= lengths[-1]:
        return values[bisect.bisect_left(lengths, tokens)]
    (x0, x1, x2), (y0, y1, y2) = lengths, values
    slope01, slope12 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curve = max((slope12 - slope01) / (x2 - x0), 0.0)
    return int(y2 + slope12 * (tokens - x2) + curve * (tokens - x1) * (tokens - x2))


def _by_definition(model: PreTrainedModel, failure: Exception) -> Trace:
    """Modules in the order in which they are defined, each touching its own weights."""
    why = f"the pass could not be traced: weights come in the order in which the model defines them ({cause(failure)})"
    named = {id(tensor): name for name, tensor in weight_names(model).items()}
    kinds: dict[tuple[str, str], set[str]] = {}

    def call(name: str, module: torch.nn.Module) -> Call:
        own = [named[id(t)] for t in (*module._parameters.values(), *module._buffers.values()) if id(t) in named]
        kind = {torch.nn.Embedding: "embedding", torch.nn.Linear: "linear"}.get(type(module), "other")
        for weight in own:
            kinds[name, weight] = {kind}
        inner = [call(f"{name}.{child}".lstrip("."), sub) for child, sub in module.named_children()]
        return Call(name, tuple(own), tuple(inner))

    root = call("", model)
    caches = {tokens: cache_by_config(model.config, tokens) for tokens in LENGTHS}
    return Trace(root, *_uses(kinds), cache_bytes=caches, traced=False, fallbacks=(why,))
