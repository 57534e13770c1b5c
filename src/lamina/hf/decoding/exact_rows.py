"""Passes of several tokens with the bits of as many passes of one token.

A product of n rows runs in other kernels than one of a single row, which add in another order: in bfloat16 a near-tie
then falls the other way, and a verified text is not the one that one token after the other gives. Within `one_row`
a pass computes as single tokens do:

- a linear goes through its weight in blocks of rows that stay in the processor's cache, and multiplies all tokens with
  one before the next: memory is read once. Where a trial shows that n rows have the bits of single ones, which holds
  for float16 and for narrow bfloat16 weights, n rows are multiplied at once;
- attention is called for one token after the other, with the keys and the mask that this token would meet;
- functions that are computed by vectors, with the ends of a row left to other code, see one token at a time.

Norms, softmax, embeddings and causal convolutions of each channel (lfm2) have the same bits anyway, as measured. Single
rows cost many more calls than one product: where other processes want the same cores, that is felt tenfold.

What cannot be had: a cache whose keys do not lie in the order of the text or are padded (only `DynamicCache`), more
than one text at a time, devices other than the processor, experts not computed one at a time, rotary angles that
depend on the length of the text, and recurrent layers, whose scan over n tokens is another formula than their step.
`covers` tells. Masks that a family makes of its own for several tokens are taken as they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lamina.caller import option
from lamina.codec import codec_for
from lamina.hf.experts import experts_by_config
from lamina.hf.internals import (
    ALL_ATTENTION_FUNCTIONS,
    attention_implementation,
    experts_implementation,
    is_stateful,
)
from lamina.plan.layout import ROW_MULTIPLE
from lamina.tensors.guard import PACKED, without_gradient
from lamina.tensors.own_products import own_linear
from lamina.tensors.packed import PackedTensor
from lamina.tensors.padded_rows import rows_as_they_are
from lamina.tensors.row_blocks import Blocks, linear_arguments

BLOCK = 8 << 20  # bytes of weight rows that all tokens are multiplied with before the next ones
GROUPS = (16, 8, 4, 2)  # rows that are multiplied at once, where that changes no bit
RECURRENT = ("linear_attention", "mamba", "mamba2", "recurrent", "rwkv", "hybrid")
LENGTH_DEPENDENT = ("dynamic", "longrope")

VECTORISED = frozenset(
    {
        functional.silu, functional.gelu, functional.softplus, functional.mish, functional.elu, functional.logsigmoid,
        torch.sigmoid, torch.Tensor.sigmoid, torch.tanh, torch.Tensor.tanh, functional.tanh, functional.sigmoid,
        torch.exp, torch.Tensor.exp, torch.pow, torch.Tensor.pow, torch.cos, torch.Tensor.cos, torch.sin,
        torch.Tensor.sin, torch.erf, torch.Tensor.erf, torch.log, torch.Tensor.log,
    }
)  # fmt: skip
PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm}
)
ADDED_PRODUCTS = frozenset({torch.baddbmm, torch.Tensor.baddbmm, torch.addmm, torch.Tensor.addmm})
SDPA = functional.scaled_dot_product_attention

_here = threading.local()  # .mode: of the pass that this thread is in
_locks: dict[int, threading.Lock] = {}  # by process: a forked child must not wait for its parent's threads
_inside = 0  # passes that are inside `one_row`, of all threads


@contextmanager
def one_row(rows: int, device: torch.device) -> Iterator[None]:
    """Within this block a pass of `rows` new tokens has the bits of `rows` passes of one token each.

    For one text with a `DynamicCache`; not for a prompt, which plain decoding computes at once too. It may be entered
    around the pass or inside of it.

    Args:
        rows: new tokens of the pass.
        device: where the model computes.
    """
    if rows < 2 or device.type != "cpu":
        yield
        return
    before = getattr(_here, "mode", None)
    mode = _here.mode = _OneRow(rows)
    try:
        with rows_as_they_are(), _attention_seen(), mode:
            yield
    finally:
        _here.mode = before


def covers(model: PreTrainedModel) -> str | None:
    """Why passes of this model cannot have the bits of single tokens; None where they can."""
    config = model.config.get_text_config()
    hindrances = (_device, _recurrent, _experts, _attention, _rotary)
    return next((why for hindrance in hindrances if (why := hindrance(model, config)) is not None), None)


def on_device(device: torch.device) -> str | None:
    """Why passes of a model that computes on `device` cannot have the bits of single tokens; None where they can."""
    if device.type in ("cpu", "meta"):
        return None
    return f"the model computes on {device.type}: only the processor's products are known"


def _device(model: PreTrainedModel, config: Any) -> str | None:
    return on_device(model.device)


def _recurrent(model: PreTrainedModel, config: Any) -> str | None:
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if kinds.isdisjoint(RECURRENT) and not is_stateful(model):
        return None
    return f"{config.model_type} has recurrent layers: several tokens are computed by another formula than one"


def _experts(model: PreTrainedModel, config: Any) -> str | None:
    chosen = experts_implementation(config)
    if chosen in (None, "eager") or not experts_by_config(config):
        return None
    return f"experts are computed by {chosen!r}, not one at a time: set {option('experts_implementation', 'eager')}"


def _attention(model: PreTrainedModel, config: Any) -> str | None:
    attention = attention_implementation(config)
    if attention not in (None, "eager", "sdpa"):
        ways = " or ".join(option("attn_implementation", way) for way in ("sdpa", "eager"))
        return f"attention is computed by {attention!r}: set {ways}"
    if attention == "eager" and model.dtype is torch.float16 and _rounds_by_shape():
        way = option("attn_implementation", "sdpa")
        return f"this processor's float16 products (AVX512-FP16) round by their shape: set {way}"
    return None


def _rotary(model: PreTrainedModel, config: Any) -> str | None:
    return "the rotary angles depend on the length of the text" if _rope_types(config) & set(LENGTH_DEPENDENT) else None


@cache
def _rounds_by_shape() -> bool:
    """Whether scores of eager attention in float16 have other bits beside more keys (bloom, docs/log.md)."""
    try:
        return "avx512_fp16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _rope_types(config: Any) -> set[str]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return {str(part.get("rope_type", part.get("type"))) for part in parts}


class _OneRow(TorchFunctionMode):
    """Computes what depends on the number of rows for one token at a time."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.single = False  # a token is on its own already

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.single:
            return func(*args, **kwargs)
        if func is functional.linear:
            return self._linear(*linear_arguments(*args, **kwargs))
        if func in VECTORISED:
            return self._by_token(func, args, kwargs)
        if func in PRODUCTS and len(args) == 2 and not kwargs:
            return self._product(func, types, *args)
        if func in ADDED_PRODUCTS and len(args) >= 3 and "out" not in kwargs:
            return self._added_product(func, args, kwargs)
        if func is SDPA:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(weight, Blocks) and weight.linear is not None:
            linear = weight.linear
            with self:  # it passes by once: with all rows, and its blocks come back here
                return without_gradient(lambda: linear(x, bias), x, weight, bias)
        pieces = _pieces(x, self.rows)
        if len(pieces) < 2:
            return functional.linear(x, weight, bias)
        if isinstance(weight, PackedTensor):
            return self._packed(x, pieces, weight, bias)
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            weight = weight.detach()  # reads it
        if (own := own_linear(x, weight, bias)) is not None:  # a row has its bits in any company
            return own
        return _linear(x, pieces, weight, bias)

    def _packed(
        self, x: torch.Tensor, pieces: tuple[torch.Tensor, ...], weight: PackedTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """As few rows at a time as the codec multiplies with by itself; what is decoded comes back here in blocks."""
        most = _own_product(weight)
        if weight.dim() != 2 or x.dtype != weight.dtype:
            return _linear(x, pieces, weight.unpack(), bias)
        flat = x.reshape(-1, x.shape[-1])

        def compute() -> torch.Tensor:
            return torch.cat([weight.linear(some, bias) for some in torch.split(flat, most or len(flat))])

        with self:
            out = without_gradient(compute, x, bias, why=PACKED)
        return out.view(*x.shape[:-1], weight.shape[0])

    def _by_token(self, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or kwargs.get("out") is not None or kwargs.get("inplace"):
            return func(*args, **kwargs)
        at = _token_dimension(x, self.rows)
        if at is None or not x.is_floating_point() or any(isinstance(a, torch.Tensor) for a in args[1:]):
            return func(*args, **kwargs)
        return torch.cat([func(one.contiguous(), *args[1:], **kwargs) for one in torch.split(x, 1, at)], at)

    def _product(self, func: Any, types: Any, left: Any, right: Any) -> Any:
        if isinstance(right, Blocks) and right.batched is not None and func in (torch.bmm, torch.Tensor.bmm):
            with self:
                return right.batched(left)
        if not isinstance(left, torch.Tensor) or left.dim() < 2 or right.dim() < 2:
            return func(left, right)
        if left.dim() == right.dim() == 2 and 1 < len(left) < self.rows:  # the tokens that were routed to an expert
            return torch.cat([func(one, right) for one in torch.split(left, 1)])
        if left.shape[-2] != self.rows:
            return func(left, right)
        return torch.cat(
            [func(*_seen(one, right, self.rows - i)) for i, one in enumerate(torch.split(left, 1, -2))], -2
        )

    def _added_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        added, left, right, *rest = args
        if left.shape[-2] != self.rows:
            return func(*args, **kwargs)
        out = []
        for i, one in enumerate(torch.split(left, 1, -2)):
            own = added[..., i : i + 1, :] if added.dim() > 1 and added.shape[-2] == self.rows else added
            out.append(func(own, one, right, *rest, **kwargs))
        return torch.cat(out, -2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of a family that asks torch for it."""
        n, keys = query.shape[-2], key.shape[-2]
        causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
        if n != self.rows or causal or attn_mask is None:
            return SDPA(query, key, value, attn_mask, *args, **kwargs)
        out = []
        for i in range(n):
            last = keys - n + i + 1
            mask = attn_mask[..., i : i + 1, :last]
            one = query[..., i : i + 1, :], key[..., :last, :], value[..., :last, :]
            out.append(SDPA(*one, None if mask.dtype == torch.bool and mask.all() else mask, *args, **kwargs))
        return torch.cat(out, -2)


def _pieces(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """What belongs to one token each: views of x."""
    if x.dim() == 2:
        of_each = x.shape[0] // rows if x.shape[0] > rows and x.shape[0] % rows == 0 else 1
        return tuple(torch.split(x, of_each))
    at = _token_dimension(x, rows)
    return (x,) if at is None else tuple(torch.split(x, 1, at))


def _token_dimension(x: torch.Tensor, rows: int) -> int | None:
    if x.dim() == 2:
        return 0 if x.shape[0] <= rows and x.shape[0] > 1 else None
    if x.dim() < 3 or x.shape[0] != 1:
        return None
    return next((at for at in (1, 2) if at < x.dim() - 1 and x.shape[at] == rows), None)


def _linear(
    x: torch.Tensor, pieces: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Block after block of the weight's rows with one token after the other."""
    flat = x.reshape(-1, x.shape[-1])
    single = len(flat) == len(pieces)  # a row for each token
    own, at = ([], 0) if single else _apart(x, pieces)
    out = x.new_empty(*(flat if single else x).shape[:-1], weight.shape[0])
    step = max(BLOCK // (weight.shape[1] * weight.itemsize) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    for first in range(0, weight.shape[0], step):
        block = weight[first : first + step]
        if weight.requires_grad and not torch.is_grad_enabled():
            block.requires_grad_()  # torch picks kernels by this flag
        added = None if bias is None else bias[first : first + step]
        some = _grouped(flat, block) if single else own
        out[..., first : first + step] = torch.cat([functional.linear(one, block, added) for one in some], at)
    return out.view(*x.shape[:-1], weight.shape[0])


def _apart(x: torch.Tensor, pieces: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], int]:
    """What belongs to one token each, on its own, and the dimension along which it was divided."""
    at = next(i for i, size in enumerate(x.shape) if pieces[0].shape[i] != size)
    # A single token's states have these strides: with those of a slice torch goes a way that takes 20 times as long.
    return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces], at


def _grouped(flat: torch.Tensor, block: torch.Tensor) -> list[torch.Tensor]:
    """The rows in groups, as many together as leave their bits alone."""
    if block.dtype not in (torch.bfloat16, torch.float16):
        return list(torch.split(flat, 1))
    threads, counts, left = torch.get_num_threads(), [], len(flat)
    while left:
        counts.append(next((n for n in GROUPS if n <= left and _alike(n, *block.shape, block.dtype, threads)), 1))
        left -= counts[-1]
    return list(torch.split(flat, counts))


@lru_cache(maxsize=1024)
def _alike(count: int, rows: int, columns: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether a product of so many rows adds as that of a single row does.

    Tried with columns that cancel each other: what remains is the error of the sums alone, so that another order shows
    in nearly every element.
    """
    generator = torch.Generator().manual_seed(0)
    half = -(-columns // 2)
    x = torch.randn(count, half, generator=generator)
    x *= torch.exp2(torch.randint(-6, 7, (count, half), generator=generator).float())
    weight = torch.randn(rows, half, generator=generator).to(dtype)
    order = torch.randperm(2 * half, generator=generator)[:columns]
    x = torch.cat([x, x], 1)[:, order].to(dtype)
    weight = torch.cat([weight, -weight], 1)[:, order]
    single = torch.cat([functional.linear(one, weight) for one in torch.split(x, 1)])
    return torch.equal(functional.linear(x, weight), single)


def _own_product(weight: PackedTensor) -> int:
    """Rows up to which the codecs of a weight multiply by themselves; 0 where they never do."""
    spans = weight.spans if weight.whole is None else ()
    most = {codec_for(span.codec).linear_tokens for span in spans} - {0}
    return min(most, default=0)


def _seen(one: torch.Tensor, right: torch.Tensor, from_end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of weights over keys without those that come after its token, which have no weight."""
    last = one.shape[-1] - from_end + 1
    if right.dim() < 3 or last < 1 or last >= one.shape[-1] or one[..., last:].count_nonzero():
        return one, right
    return one[..., :last], right[..., :last, :]


@contextmanager
def _attention_seen() -> Iterator[None]:
    """Transformers hands out attention that asks `_here` whether it goes token by token."""
    global _inside
    with _locks.setdefault(os.getpid(), threading.Lock()):
        _inside += 1
        if _inside == 1:
            ALL_ATTENTION_FUNCTIONS.get_interface = _interface
    try:
        yield
    finally:
        with _locks.setdefault(os.getpid(), threading.Lock()):
            _inside -= 1
            if _inside == 0:
                del ALL_ATTENTION_FUNCTIONS.get_interface


def _interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    plain: Callable[..., Any] = type(ALL_ATTENTION_FUNCTIONS).get_interface(
        ALL_ATTENTION_FUNCTIONS, implementation, default
    )
    mode: _OneRow | None = getattr(_here, "mode", None)
    if mode is None or implementation not in ("eager", "sdpa"):
        return plain

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[0] != 1 or query.shape[2] != mode.rows or mode.single:
            return plain(module, query, key, value, attention_mask, *args, **kwargs)
        mode.single = True
        try:
            return _token_by_token(plain, module, (query, key, value), attention_mask, args, kwargs)
        finally:
            mode.single = False

    return attention


def _token_by_token(
    plain: Callable[..., Any], module: Any, states: tuple[torch.Tensor, ...], mask: Any, args: Any, kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of each new token over the keys that a cache would give it alone.

    Args:
        states: query, key and value, of shape (1, heads, new tokens or keys, size).
        mask: shape (1, 1 or heads, new tokens, keys), or None.
    """
    query, key, value = states
    count, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = _window(module)
    bias = kwargs.pop("position_bias", None)
    found = []
    for i in range(count):
        last = keys - count + i + 1 if causal else keys
        first = max(last - window, 0) if window is not None and causal else 0
        own = None if mask is None else _own_mask(mask[:, :, i : i + 1, first:last], window)
        if bias is not None:
            kwargs["position_bias"] = bias[:, :, i : i + 1, first:last]
        seen = key[:, :, first:last], value[:, :, first:last]
        found.append(plain(module, query[:, :, i : i + 1], *seen, own, *args, **kwargs))
    return torch.cat([out for out, _ in found], 1), _side_by_side([weights for _, weights in found])


def _own_mask(mask: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The mask of a single token; transformers makes none for one that sees all keys."""
    whole = mask.dtype == torch.bool and (window is None or mask.shape[-1] < window) and bool(mask.all())
    return None if whole else mask


def _side_by_side(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The weights of attention that each token gave, if any did, padded to as many keys as the last one has."""
    given = [weights for weights in rows if weights is not None]
    width = max((weights.shape[-1] for weights in given), default=0)
    padded = [functional.pad(weights, (0, width - weights.shape[-1])) for weights in given]
    return torch.cat(padded, 2) if padded else None


def _window(module: Any) -> int | None:
    """Keys that a cache keeps for this layer, the new one among them; None for all."""
    config = getattr(module, "config", None)
    index = getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if kinds and index is not None and index < len(kinds):
        found = sliding if "sliding" in kinds[index] else chunk if "chunked" in kinds[index] else None
    else:
        found = sliding or chunk
    return found if isinstance(found, int) and found > 0 else None
