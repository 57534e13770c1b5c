"""The schedule of a pass, derived by running the model once on the meta device.

A torch-function mode sees which parameter each operation touches, hooks tell which module is running:
together they give the calls of a pass, in order, with the weights that each one's own code needs. Nothing
is computed and nothing is guessed from names. Where a family cannot run on meta tensors the order of
definition stands in; the stream then serves what comes out of order on demand.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from lamina.fallbacks import cause
from lamina.hf.experts import experts_by_config, standing_in
from lamina.hf.internals import arguments_of, cache_argument, cache_of, encoded
from lamina.hf.recorder import Memory, Recorder, weight_names
from lamina.plan.schedule import Call

KEEP = "logits_to_keep"
LOSS = 3 * 4  # bytes that a loss takes for each logit: in fp32, their exponents, the loss's own copy
WORKSPACE = 1.25  # kernels' workspaces and what the allocator keeps (docs/log.md)
LENGTHS = (16, 32, 64)  # tokens of the traced prefills: enough to fit a + b T + c T^2
# (guarded, answering) where code asks for values: as it is, failing modules stubbed, values made up, both
_WAYS_ROUND = ((False, False), (True, False), (False, True), (True, True))
MEDIA = 64 << 20  # bytes that a model for images or sound has room for in every plan
MEDIA_NAMES = ("pixel_values", "input_features", "input_values", "flattened_patches")
SAMPLES = 16_000  # of a made-up sound, a second
LONG_SOUND = 1500  # positions of a made-up sound, where the config names none
_OF_META = ("meta", "DataDependent", "data-dependent", "data dependent", "item()", "FakeTensor")


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
        media_bytes: what an image or a sound of the size that the config names takes; 0 of a model for text alone.
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
    media_bytes: int = 0

    def activations(self, tokens: int) -> int:
        """Bytes to keep for activations and kernels' workspaces: a prefill of `tokens`, an image or a sound."""
        return max(self.of_tokens(tokens), int(WORKSPACE * self.media_bytes))

    def of_tokens(self, tokens: int) -> int:
        """Bytes of activations and kernels' workspaces for a prefill of `tokens`, from the traced lengths."""
        lengths = sorted(self.activation_bytes)
        points = (self.activation_bytes, *(dict(zip(lengths, moment, strict=True)) for moment in self.moments))
        return int(WORKSPACE * max(_extrapolate(each, tokens) for each in points))

    def cache(self, tokens: int) -> int:
        """Bytes of the key-value cache after `tokens`."""
        return _extrapolate(self.cache_bytes, tokens)


class Logits:
    """How large a pass's logits are.

    Args:
        model: one that takes `logits_to_keep` is traced with the last token's logits alone, so that the others count
            here; one that does not is traced with all, and nothing counts here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        self._each = vocabulary * model.dtype.itemsize if KEEP in arguments_of(model) else 0
        self._loss = vocabulary * LOSS

    def of(self, rows: int, length: int, kwargs: Mapping[str, Any]) -> int:
        """Bytes of the logits of a pass beyond one token's.

        Args:
            rows: of the batch.
            length: tokens of each row.
            kwargs: of `forward`.
        """
        kept = kwargs.get(KEEP, 0)
        of_a_row = kept.numel() if isinstance(kept, torch.Tensor) else kept or length
        count = rows * min(of_a_row, length)
        loss = self._loss * count if kwargs.get("labels") is not None else 0
        return max(count - 1, 0) * self._each + loss


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
    for (guarded, answering), (kind, inputs) in itertools.product(_WAYS_ROUND, _ways_in(model)):
        if failure is not None and not excused and (guarded or answering):
            raise failure  # as generation calls it, and no value was asked for: it will fail with values, too
        try:
            passes = {tokens: _run(model, tokens, inputs, guarded, answering) for tokens in _lengths(model)}
        except Exception as error:  # any family may refuse meta tensors in its own way
            failure = failure or error
            excused = excused or _excuses(error, model, kind)
            continue
        found = _made_of(model, passes, kind, _second_ways(model, kind, guarded, answering, failure))
        found = _with_encoder(model, found) if _decodes(model) else found
        return replace(found, media_bytes=_media_bytes(model))
    assert failure is not None
    return replace(_by_definition(model, failure), media_bytes=_media_bytes(model))


def _media_bytes(model: PreTrainedModel) -> int:
    """Activations of a pass with an image or a sound of the size that the config names, and no less than `MEDIA`.

    Counted as far as the pass runs without values, which is behind the tower in most families.
    """
    if not any(name.startswith(MEDIA_NAMES) for name in arguments_of(model)):
        return 0
    made = _made_up_inputs(model)
    if not made:
        return MEDIA
    tensors, recorder = _recorder(model, answering=True)
    of_text = "decoder_input_ids" if "decoder_input_ids" in arguments_of(model) else "input_ids"
    text = {of_text: _ids(min(LENGTHS))} if of_text in arguments_of(model) else {}
    with suppress(Exception), torch.no_grad(), standing_in(model), recorder.memory, recorder:
        torch.func.functional_call(model, tensors, kwargs={**text, **made})
    return max(recorder.memory.peak, MEDIA)


def _lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens of the traced prefills: fewer where a model takes no more."""
    most = getattr(_text_config(model.config), "max_position_embeddings", None)
    if not isinstance(most, int) or not 4 <= most < LENGTHS[-1]:
        return LENGTHS
    return most // 4, most // 2, most


def _made_of(
    model: PreTrainedModel, passes: Mapping[int, tuple[Recorder, int]], kind: _Cache, fallbacks: tuple[str, ...]
) -> Trace:
    """The trace of passes of each length, from what was recorded in them and the bytes of their caches."""
    activations: dict[int, int] = {}
    alive: dict[int, list[int]] = {}
    for tokens, (recorder, cache_bytes) in passes.items():
        # the cache is among what is alive at the end, and counted on its own
        activations[tokens] = max(recorder.memory.peak - cache_bytes, recorder.memory.peak // 4)
        alive[tokens] = [max(nbytes - cache_bytes, 0) for nbytes in recorder.memory.history]
    caches = {tokens: cache_bytes for tokens, (_, cache_bytes) in passes.items()}
    uncounted = kind is _Cache.NONE or (model.can_generate() and not any(caches.values()))
    if uncounted and cache_argument(model) is not None:
        caches = {tokens: cache_by_config(model.config, tokens) for tokens in passes}
    last, _ = passes[max(passes)]
    return Trace(
        last.root.freeze(), *_uses(last.kinds), activations, caches, last.experts, last.routed, last.routers,
        operations=last.operations, fallbacks=fallbacks, moments=_moments(alive),
    )  # fmt: skip


def _excuses(error: Exception, model: PreTrainedModel, kind: _Cache) -> bool:
    """Whether a failure may come of tensors that have no values, or of an input that is missing, and not of shapes.

    Shapes are as they will be with real values. Generation gives a cache to whatever takes one: what fails without
    says nothing.
    """
    if kind is _Cache.NONE and cache_argument(model) is not None:
        return False
    seen = " ".join(f"{type(each).__name__} {each}" for each in (error, error.__cause__, error.__context__) if each)
    missing = isinstance(error, NotImplementedError | TypeError | AttributeError)
    return missing or any(word in seen for word in _OF_META) or _wants_more(model, error)


def only_text(model: PreTrainedModel) -> bool:
    """Whether a model takes tokens alone: no images, no sound, nothing for a decoder of its own."""
    return not any(name.startswith((*MEDIA_NAMES, "decoder_input_ids", "bbox")) for name in arguments_of(model))


def _wants_more(model: PreTrainedModel, error: Exception) -> bool:
    """Whether an error of a model's forward names an argument that it takes beside tokens: it was not given that."""
    if isinstance(error, NotImplementedError) or not isinstance(error, ValueError | TypeError):
        return False
    text = str(error).lower()
    return any(name in text for name in arguments_of(model) if name not in ("self", "input_ids", "kwargs"))


class _Cache(Enum):
    """Where the cache of a traced pass comes from."""

    GIVEN = "a DynamicCache is given, as generation gives it"
    OWN = "the model makes one, of its own kind"
    NONE = "there is none"


_Entry = tuple[_Cache, Callable[[int], dict[str, Any]]]
"""Where the cache comes from, and (tokens -> arguments of `forward`)."""


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
    text = _text_config(config)

    def number(*names: str) -> int:
        return next((int(value) for name in names if isinstance(value := getattr(text, name, None), int)), 0)

    heads = number("num_attention_heads", "n_head", "n_heads")
    size = number("head_dim") or number("hidden_size", "n_embd", "d_model") // max(heads, 1)
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return 2 * layers * (number("num_key_value_heads") or heads) * size * itemsize * tokens


def _text_config(config: Any) -> Any:
    """The part of a config that is about text, or all of one that has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _uses(kinds: Mapping[tuple[str, str], set[str]]) -> tuple[dict[str, frozenset[str]], frozenset[tuple[str, str]]]:
    """`uses` and `lookups` of a trace, from the kinds of operation by module and weight."""
    uses: dict[str, frozenset[str]] = {}
    for (_, name), own in kinds.items():
        uses[name] = uses.get(name, frozenset()) | (own - {"view"} or {"other"})
    return uses, frozenset(key for key, own in kinds.items() if own == {"embedding"})


def _ids(tokens: int, *more: int) -> torch.Tensor:
    return torch.zeros(1, tokens, *more, dtype=torch.long, device="meta")


def _ways_in(model: PreTrainedModel) -> Iterator[_Entry]:
    """Inputs to try, from what generation passes to the barest."""
    config = model.config
    accepted, cache = arguments_of(model), cache_argument(model)
    last_only = {KEEP: 1} if KEEP in accepted else {}

    def cached(tokens: int) -> dict[str, Any]:
        return {
            "input_ids": _ids(tokens),
            str(cache): DynamicCache(config=config),
            "use_cache": True,
            **last_only,
        }

    def positioned(tokens: int) -> dict[str, Any]:
        return {**cached(tokens), "position_ids": _ids(tokens)}

    def bare(tokens: int) -> dict[str, Any]:
        return {"input_ids": _ids(tokens), "use_cache": False}

    def masked(tokens: int) -> dict[str, Any]:
        return {**bare(tokens), "attention_mask": torch.ones(1, tokens, dtype=torch.long, device="meta")}

    if _decodes(model) and model.can_generate():
        yield from _ways_of_decoder(model)
    if "decoder_input_ids" in accepted:
        yield from _ways_of_both(model)
    if cache is not None:
        yield _Cache.GIVEN, cached
        if codebooks := getattr(config, "num_codebooks", 0):  # beside each token its sound, an id of each codebook
            yield _Cache.GIVEN, lambda tokens: {**cached(tokens), "input_ids": _ids(tokens, codebooks + 1)}
        if "position_ids" in accepted:
            yield _Cache.GIVEN, positioned
        yield _Cache.OWN, lambda tokens: {"input_ids": _ids(tokens), "use_cache": True, **last_only}
    yield _Cache.NONE, bare
    yield _Cache.NONE, masked
    yield _Cache.NONE, lambda tokens: {"input_ids": _ids(tokens)}
    if more := _made_up_inputs(model):
        yield _Cache.OWN, lambda tokens: {"input_ids": _ids(tokens), "use_cache": True, **last_only, **more}
        yield _Cache.NONE, lambda tokens: {"input_ids": _ids(tokens), **more}
        if "input_ids" not in accepted:
            yield _Cache.NONE, lambda tokens: dict(more)


def _decodes(model: PreTrainedModel) -> bool:
    """Whether a model reads with an encoder once, and then decodes token by token."""
    return "decoder_input_ids" in arguments_of(model) and "encoder_outputs" in arguments_of(model)


def _decoder_inputs(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    last_only = {KEEP: 1} if KEEP in arguments_of(model) else {}
    return {"decoder_input_ids": _ids(tokens), "use_cache": True, **last_only}


def _ways_of_decoder(model: PreTrainedModel) -> Iterator[_Entry]:
    """Inputs of a decoder alone, which is what each step of generation after the first one runs."""
    width, cache = _width(model.config), str(cache_argument(model))

    def read(tokens: int) -> dict[str, Any]:
        states = torch.zeros(1, tokens, width, dtype=model.dtype, device="meta")
        return {"encoder_outputs": encoded(states), **_decoder_inputs(model, tokens)}

    yield _Cache.GIVEN, lambda tokens: {**read(tokens), cache: EncoderDecoderCache(DynamicCache(), DynamicCache())}
    yield _Cache.OWN, read


def _ways_of_both(model: PreTrainedModel) -> Iterator[_Entry]:
    """Inputs of an encoder and its decoder."""
    yield _Cache.OWN, lambda tokens: {"input_ids": _ids(tokens), **_decoder_inputs(model, tokens)}
    if more := _made_up_inputs(model):
        yield _Cache.OWN, lambda tokens: {**more, **_decoder_inputs(model, tokens)}


def _with_encoder(model: PreTrainedModel, found: Trace) -> Trace:
    """The trace of a decoder, with the activations of a pass that goes through its encoder as well."""
    for kind, inputs in _ways_of_both(model):
        try:
            passes = {tokens: _run(model, tokens, inputs, answering=True) for tokens in _lengths(model)}
        except Exception:  # it is then counted when such a pass comes
            continue
        whole = _made_of(model, passes, kind, ())
        most = {n: max(nbytes, found.activation_bytes.get(n, 0)) for n, nbytes in whole.activation_bytes.items()}
        return replace(found, activation_bytes=most, moments=(*found.moments, *whole.moments))
    return found


def _width(config: Any) -> int:
    """Columns of what an encoder gives."""
    own = getattr(config, "encoder", None) or getattr(config, "text_config", None) or config
    return next((int(n) for name in ("d_model", "hidden_size") if isinstance(n := getattr(own, name, None), int)), 1)


def _made_up_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """An image and a sound as large as a model's config says, without values, where its forward takes such."""
    config, accepted = model.config, arguments_of(model)
    vision, audio = (getattr(config, name, None) or config for name in ("vision_config", "audio_config"))
    made: dict[str, tuple[int, ...]] = {}
    side = getattr(vision, "image_size", None)
    if "pixel_values" in accepted and side:
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        made["pixel_values"] = (1, getattr(vision, "num_channels", 3), *sides[-2:])
    if "input_features" in accepted and (mels := getattr(audio, "num_mel_bins", None)):
        made["input_features"] = (1, mels, 2 * (getattr(audio, "max_source_positions", None) or LONG_SOUND))
    elif "input_values" in accepted:
        made["input_values"] = (1, SAMPLES)
    return {name: torch.zeros(shape, dtype=model.dtype, device="meta") for name, shape in made.items()}


def _run(
    model: PreTrainedModel,
    tokens: int,
    way: Callable[[int], dict[str, Any]],
    guarded: bool = False,
    answering: bool = False,
) -> tuple[Recorder, int]:
    """One forward on meta tensors; the recorder that watched it and the bytes of its cache."""
    tensors, recorder = _recorder(model, answering)
    inputs = way(tokens)
    inside = recorder.guarding(model) if guarded else nullcontext()
    with torch.no_grad(), standing_in(model), recorder.watching(model), inside, recorder.memory, recorder:
        outputs = torch.func.functional_call(model, tensors, kwargs=inputs)
    cache = cache_of(inputs) or (cache_of(outputs) if isinstance(outputs, Mapping) else None)
    return recorder, sum(_nbytes(leaf) for leaf in _tensors_of(cache)) if cache is not None else 0


def _recorder(model: PreTrainedModel, answering: bool) -> tuple[dict[str, torch.Tensor], Recorder]:
    """Weights without memory in place of a model's own, and a recorder that knows them."""
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in weight_names(model).items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    return tensors, Recorder(names, Memory(tensors.values()), answering, experts_by_config(model.config))


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
    if len({len(each) for each in alive.values()}) > 1:
        return ()
    lengths, kept = sorted(alive), list[tuple[int, ...]]()
    for moment in sorted(set(zip(*(alive[tokens] for tokens in lengths), strict=True)), key=lambda each: -each[2]):
        shape = _shape(lengths, moment)
        if not any(all(a >= b for a, b in zip(_shape(lengths, other), shape, strict=True)) for other in kept):
            kept.append(moment)
    return tuple(kept)


def _shape(lengths: Sequence[int], moment: tuple[int, ...]) -> tuple[float, float, float]:
    """Value at the longest traced length, slope there, curve."""
    (x0, x1, x2), (y0, y1, y2) = lengths, moment
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
