"""From a built model and its trace to the planner's schedule: every weight as extents."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from lamina.checkpoint import Checkpoint
from lamina.checkpoint.gguf import CODEC_PREFIX
from lamina.codec import AFFINE, LOSSLESS, native
from lamina.hf.recorder import layer_names, weight_names
from lamina.hf.trace import Trace
from lamina.plan.layout import PACKING, align
from lamina.plan.schedule import Call, Convert, Cut, PanelSpan, Piece, Schedule, Weight
from lamina.tensors.disk import DiskTensor, torch_dtype
from lamina.tensors.expressions import Expression, replay, sources_of
from lamina.tensors.packed import BLOCK, PackedTensor, Scratch, block_rows
from lamina.weights.addresses import Addresses, addresses_of, whole_tensor

WITH_KERNELS = (*AFFINE, LOSSLESS.name, CODEC_PREFIX)  # codecs
REPLAY_COPIES = 3  # of a weight while its expression is computed: intermediate results in a wider dtype
PACKED_FROM = 1.25  # times smaller on disk: from there on a replayed weight stays in memory as it is stored
SMALL_SHARE = 0.0005  # of the model: the smallest weights that together stay below it are always resident


@dataclass(frozen=True)
class Replay:
    """How to compute a weight from its stored sources.

    Attributes:
        expression: recorded by transformers' loader.
        sources: name, byte offset, shape and dtype of each source in the stored area.
        packed: the panels of the sources that are stored in panels.
        orders: the order of rows of the sources whose file has another one.
    """

    expression: Expression
    sources: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    packed: Mapping[str, tuple[PanelSpan, ...]] = field(default_factory=dict)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """Compute the weight.

        Args:
            stored: uint8 of shape (stored_nbytes,).
        """
        loaded = {}
        for name, at, shape, dtype in self.sources:
            if name in self.packed:
                order = self.orders.get(name)
                loaded[name] = PackedTensor(
                    shape, dtype, stored[at:], self.packed[name], Scratch(), order=order
                ).unpack()
                continue
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            loaded[name] = stored[at : at + nbytes].view(dtype).view(shape)
            if name in self.orders:
                loaded[name] = loaded[name][self.orders[name]]
        return replay(self.expression, loaded.__getitem__)


@dataclass(frozen=True)
class Weights:
    """The schedule, and what pure data cannot hold: the replays, by weight name, and the stored dtypes.

    `routers` are the modules that say where tokens go, by the experts module that they say it to; `orders` the
    order of a weight's rows among those stored.
    """

    schedule: Schedule
    replays: Mapping[str, Replay]
    stored_dtypes: Mapping[str, torch.dtype]
    routers: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)


def describe(model: torch.nn.Module, checkpoint: Checkpoint, traced: Trace) -> Weights:
    """Everything that the planner and the stream need to know about a model's weights."""
    buffers = {name for name, _ in model.named_buffers()}
    weights: dict[str, Weight] = {}
    replays: dict[str, Replay] = {}
    stored: dict[str, torch.dtype] = {}
    orders: dict[str, torch.Tensor] = {}
    for name, tensor in weight_names(model).items():
        if not isinstance(tensor, DiskTensor):
            continue
        uses, experts = traced.uses.get(name, frozenset()), traced.experts.get(name, 0)
        weight, own = _weight(name, tensor, checkpoint, uses, experts, name in buffers)
        if own is not None:
            replays[name] = own
        elif tensor.boxes:
            stored[name] = tensor.boxes[0].view.dtype
            source = tensor.boxes[0].source
            if isinstance(source, str) and source in checkpoint.row_orders:
                orders[name] = torch.tensor(checkpoint.row_orders[source])
        weights[name] = weight
    for name in _small(weights):
        weights[name] = replace(weights[name], always=True, gathered=False)
    root = _without_lookups(traced.root, traced.lookups, weights)
    branches = _branches(model, traced.uses.keys(), {w.name for w in weights.values() if not (w.always or w.gathered)})
    schedule = Schedule(root, weights, layer_names(model), traced.traced, dict(traced.routed),
                        scratch_bytes(weights.values()), traced.operations, branches)  # fmt: skip
    return Weights(schedule, replays, stored, traced.routers, orders)


def _branches(model: torch.nn.Module, used: Collection[str], large: Collection[str]) -> tuple[Call, ...]:
    """The outermost modules of which the traced pass uses no weight, each with its calls in the order of definition.

    Args:
        used: names of the weights that the traced pass uses.
        large: names of those that may stream.
    """
    names = {id(tensor): name for name, tensor in weight_names(model).items()}
    idle = set(large).difference(used)

    def own(module: torch.nn.Module) -> list[str]:
        found = (names.get(id(tensor)) for tensor in module.parameters(recurse=False))
        return [name for name in found if name is not None and name in large]

    def calls(name: str, module: torch.nn.Module) -> tuple[Call, ...]:
        inner = [call for child, sub in module.named_children() for call in calls(f"{name}.{child}".lstrip("."), sub)]
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            return tuple(inner)  # nobody calls a list
        return (Call(name, tuple(own(module)), tuple(inner)),)

    def outermost(name: str, module: torch.nn.Module) -> Iterator[Call]:
        held = {names[id(tensor)] for tensor in module.parameters() if id(tensor) in names}
        if not held & idle:
            return
        if held.isdisjoint(used) and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from calls(name, module)
            return
        for child, inner in module.named_children():
            yield from outermost(f"{name}.{child}".lstrip("."), inner)

    return tuple(outermost("", model))


def _weight(
    name: str, tensor: DiskTensor, checkpoint: Checkpoint, uses: frozenset[str], experts: int, is_buffer: bool
) -> tuple[Weight, Replay | None]:
    """A weight as the planner knows it, and how to compute it where its bytes have no addresses."""
    found = addresses_of(tensor, checkpoint)
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if found is None:
        own, pieces, nbytes = _replayed(tensor, checkpoint)
        shrinks = nbytes * PACKED_FROM <= tensor.numel() * tensor.element_size() and len(shape) >= 2
        convert = Convert.UNPACK if shrinks and not is_buffer else Convert.REPLAY
        return Weight(name, shape, dtype, tensor.element_size(), pieces, 0, nbytes, convert, always=is_buffer), own
    cut = _cut(shape, uses, experts)
    always = is_buffer or not tensor.numel()
    weight = Weight(
        name,
        shape,
        dtype,
        tensor.element_size(),
        found.pieces,
        1 if found.segments else (tensor.cast_from or tensor.dtype).itemsize,
        found.nbytes,
        _convert(tensor, found),
        cut,
        gathered=uses == {"embedding"} and len(shape) == 2 and not always,
        always=always,
        experts=experts if cut is Cut.EXPERTS else 0,
        segments=found.segments,
    )
    return weight, None


def _convert(tensor: DiskTensor, found: Addresses) -> Convert:
    """What is between the bytes that were found and the tensor."""
    if found.segments:
        return Convert.UNPACK
    return Convert.NONE if tensor.cast_from is None else Convert.CAST


def _cut(shape: tuple[int, ...], uses: frozenset[str], experts: int) -> Cut:
    """How a weight may be consumed in blocks, by what the trace saw it used for."""
    if uses - {"embedding"} == {"linear"} and len(shape) == 2:
        return Cut.ROWS
    if uses == {"experts"} and len(shape) >= 2 and experts and shape[0] % experts == 0:
        return Cut.EXPERTS
    return Cut.WHOLE


def _small(weights: Mapping[str, Weight]) -> list[str]:
    """One-dimensional weights, and the smallest others that together are a negligible share."""
    total = sum(weight.nbytes for weight in weights.values())
    names = [w.name for w in weights.values() if len(w.shape) < 2]
    left = SMALL_SHARE * total
    for weight in sorted(weights.values(), key=lambda w: w.nbytes):
        if len(weight.shape) < 2:
            continue
        left -= weight.nbytes
        if left < 0:
            break
        names.append(weight.name)
    return names


def _without_lookups(call: Call, lookups: frozenset[tuple[str, str]], weights: Mapping[str, Weight]) -> Call:
    """The calls without the touches that only look rows up, which are served row by row.

    A tied table is looked up in one module and multiplied in another: there it streams.
    """

    def streams(module: str, name: str) -> bool:
        weight = weights.get(name)
        if weight is None:
            return False
        return not (len(weight.shape) == 2 and weight.by_rows and (module, name) in lookups)

    def visit(node: Call) -> Call:
        return Call(
            node.module,
            tuple(name for name in node.touches if streams(node.module, name)),
            tuple(visit(inner) for inner in node.calls),
        )

    return visit(call)


def _replayed(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[Replay, tuple[Piece, ...], int]:
    pieces, sources, at = [], [], 0
    packed, orders = {}, {}
    for name in sources_of(tensor.expression):
        entry = checkpoint.tensors[name]
        if entry.encoding is not None:
            packed[name] = whole_tensor(entry)
        if name in checkpoint.row_orders:
            orders[name] = torch.tensor(checkpoint.row_orders[name])
        pieces.append(Piece(entry.extent, at))
        sources.append((name, at, entry.shape, torch_dtype(entry)))
        at = align(at + entry.extent.length, PACKING)
    return Replay(tensor.expression, tuple(sources), packed, orders), tuple(pieces), at


def scratch_bytes(weights: Iterable[Weight]) -> int:
    """Memory that unpacking takes: a block of rows for linears, the whole of what is used in another way."""
    block = whole = 0
    for weight in weights:
        if weight.convert is not Convert.UNPACK:
            continue
        if weight.cut is Cut.ROWS and weight.segments:
            rows = max(block_rows(weight.shape[-1], weight.itemsize, s.codec, s.panel_rows) for s in weight.segments)
            block = max(block, BLOCK, min(rows, weight.rows) * weight.shape[-1] * weight.itemsize)
        elif not weight.gathered:
            own = weight.unpacked_nbytes // max(weight.experts, 1)
            whole = max(whole, own if weight.segments else own * REPLAY_COPIES)
    return block + whole


def prepare(weights: Iterable[Weight]) -> None:
    """Have the codecs' kernels ready, which may mean compiling them: before memory is full."""
    codecs = {segment.codec for weight in weights for segment in weight.segments}
    if any(codec.startswith(WITH_KERNELS) for codec in codecs):
        native.library()


def without_kernels(weights: Iterable[Weight]) -> list[str]:
    """Second ways of unpacking: what torch does because there is no kernel, and why there is none."""
    codecs = {segment.codec for weight in weights for segment in weight.segments}
    ours = sorted({codec for codec in codecs if codec.startswith(WITH_KERNELS)})
    found = []
    if ours and (why := native.missing()):
        found.append(f"weights stored as {', '.join(ours)} are unpacked by torch, many times more slowly: {why}")
    if codecs - set(ours):
        found.append("weights of a quantised checkpoint are unpacked by torch, at 0.1 to 5 GB/s: no kernel knows them")
    return found
