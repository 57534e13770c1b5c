"""Binds a plan to a model: weights are in their modules exactly while the modules run.

Resident weights are ordinary parameters and cost nothing. A streamed unit is bound by a hook when its
module is entered and unbound when it is left. What the plan did not foresee (a weight touched out of
order, by the user, or by a branch that the trace did not take) is read on demand: slow, but right.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamina.errors import BudgetError, UnsupportedError
from lamina.hf.names import PreTrainedModel
from lamina.plan.cut import Item
from lamina.plan.layout import Part, Placed, Read, lay_out
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan
from lamina.plan.schedule import Convert, Weight
from lamina.progress import Progress
from lamina.runtime.expert_hooks import ExpertHooks
from lamina.runtime.overrides import Home, Overrides
from lamina.runtime.residents import AT_ONCE, load_residents
from lamina.runtime.schedule import Weights
from lamina.runtime.sites import Site, Sites
from lamina.runtime.turn import Turn
from lamina.stream.device import Device, device_for
from lamina.stream.experts import Counts, ExpertStream
from lamina.stream.memory import Area
from lamina.stream.readers import Readers
from lamina.stream.stream import Held, Stream
from lamina.tensors.disk import DiskTensor
from lamina.tensors.guard import guarded
from lamina.tensors.ids import OTHERS, TOKENS, check_ids
from lamina.tensors.packed import Encoded, Scratch
from lamina.tensors.padded_rows import product
from lamina.tensors.row_blocks import Blocks


class Engine:
    """One model, one plan, one stream.

    Args:
        model: built on DiskTensors.
        weights: its schedule, with what turns stored bytes into tensors.
        plan: what lives where.
        device: where the model computes.
        readers: the reader threads; closed with the engine.
        foresee: read experts before their router has spoken, where the one before it tells which ones are likely.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        plan: Plan,
        device: torch.device,
        readers: Readers,
        foresee: bool = True,
    ) -> None:
        self.plan, self.weights, self.device, self.readers, self.foresee = plan, weights, device, readers, foresee
        self.lock = Turn()
        self.stream: Stream | None = None
        self.experts: ExpertStream | None = None
        self.followers: list[Callable[[], None]] = []  # told when weights are no longer where they were
        self._handles: list[Any] = []
        self._held: dict[str, list[Held]] = defaultdict(list)
        self._pid = os.getpid()
        self._in_pass = False
        self._waited = 0.0  # in streams that are no more
        self._before_pass = Counts()
        self._expert_hooks: ExpertHooks | None = None
        self._scratch = Scratch()
        self._model = weakref.ref(model)
        self._sites = _sites(model)
        self._disk = {name: self._disk_tensor(name) for name in self._sites}
        self._bound: dict[str, torch.Tensor] = {}  # what stands in the modules of a resident weight
        self._stand_ins: dict[str, Blocks] = {}
        self._given: dict[str, torch.Tensor | None] = {}  # bound last: an interrupt may have left it there
        self.overrides = Overrides(self)

    def start(self, model: PreTrainedModel, progress: Progress | None = None) -> None:
        """Read the resident weights, bind them, and let the stream run ahead."""
        resident = [self.schedule[name] for name in self.schedule if name in self.plan.resident]
        if self.device.type != "cpu":
            _move_buffers(model, self.device)
        for name, tensor in load_residents(resident, self.readers, self.finish, self.device, progress).items():
            parameter = tensor
            if isinstance(tensor, Encoded):
                tensor.home = self._disk[name].home
            else:
                parameter = nn.Parameter(tensor, requires_grad=_differentiable(tensor))
            self._bound[name] = parameter
            for module, attribute, is_buffer in self._sites[name]:
                if is_buffer:
                    module._buffers[attribute] = tensor
                else:
                    module._parameters[attribute] = parameter  # type: ignore[assignment]
        if self.plan.streams:
            self._attach(model)

    @property
    def in_pass(self) -> bool:
        """Whether the model is running."""
        return self._in_pass

    def plan_for(self, budget: Budget, without: Collection[str] = ()) -> Plan:
        """A plan for another budget that holds nothing in memory but what is there now.

        Args:
            without: weights that are held in place of what is on disk, beside those that are already.

        Raises:
            BudgetError: not even the smallest plan keeps that budget.
        """
        gone = {*self.overrides.held, *self.overrides.gone, *without}
        schedule = self.weights.schedule.without(gone)
        return make_plan(schedule, budget, self.plan.hardware, self.plan.resident - gone)

    def replan(self, budget: Budget, without: Collection[str] = ()) -> None:
        """Go over to a plan for another budget, with less resident.

        A resident weight that would have to be given up, but is not what the disk holds any more, stays instead.

        Args:
            without: weights that are about to be held in place of what is on disk.

        Raises:
            BudgetError: not even the smallest plan keeps that budget.
        """
        kept: dict[str, torch.Tensor] = {}
        while True:
            plan = self.plan_for(budget, {*without, *kept})
            dropped = (self.plan.resident & self._bound.keys()) - plan.resident - kept.keys() - set(without)
            written = {name: self._bound[name] for name in sorted(dropped) if self._was_written(name)}
            if not written:
                break
            kept |= written
            nbytes = sum(weight.nbytes for weight in written.values())
            budget = replace(budget, override_bytes=budget.override_bytes + nbytes)
        for name, weight in kept.items():
            self.overrides.keep(name, weight)
        self._follow(plan)

    def spend(self, nbytes: int, without: Collection[str]) -> None:
        """Set memory aside for weights that are about to be held in place of what is on disk.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
        """
        budget = replace(self.plan.budget, override_bytes=self.plan.budget.override_bytes + nbytes)
        if self.plan.has_room_for(budget):
            self.plan = replace(self.plan, budget=budget)
            return
        for times in (8, 2, 1):  # more are likely to follow: a plan for each of them would take long
            with contextlib.ExitStack() as stack:
                if times > 1:
                    stack.enter_context(contextlib.suppress(BudgetError))
                self.replan(replace(budget, override_bytes=budget.override_bytes + (times - 1) * nbytes), without)
                self.plan = replace(self.plan, budget=budget)
                return

    def _was_written(self, name: str) -> bool:
        """Whether a resident weight is another one than the disk holds."""
        bound = self._bound[name]
        if isinstance(bound, Encoded):
            return False  # whoever writes to it has made it an override
        if any(standing(site) is not bound for site in self._sites[name]):
            return True
        weight = self.schedule[name]
        if bound.shape != weight.shape or bound.dtype != _dtype(weight):
            return True
        rows = (
            max(AT_ONCE * weight.rows // max(weight.nbytes, 1), 1) if weight.by_rows and weight.shape else weight.rows
        )
        for first in range(0, max(weight.rows, 1), rows):
            part = bound.detach()[first : first + rows] if weight.shape else bound.detach()
            if not same_bits(part, self._rows(name, first, min(rows, weight.rows - first))):
                return True
        return False

    def _rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows of a weight, read now."""
        layout = lay_out([(self.schedule[name], Part(name, first, count))])
        area = Area(layout.nbytes)
        self.readers.read(layout.reads, area)
        tensor = self.finish(layout.placed[0], area.tensor)
        tensor = tensor.decode() if isinstance(tensor, Encoded) else tensor
        return tensor.detach().to(self.device)

    def foreign(self) -> Iterator[tuple[str, Site, torch.Tensor | None]]:
        """Places of streamed weights where somebody put another tensor, or took the parameter away.

        What the engine itself left there, because an interrupt came, or a caller put back, is made good on the way.
        """
        for name, sites in self._sites.items():
            if name in self.plan.resident or name in self.overrides.held:  # buffers are always resident
                continue
            disk, stand_in = self._disk[name], self._stand_ins.get(name)
            for site in tuple(sites):
                found = standing(site)
                if found is disk or (found is not None and found is stand_in):
                    continue
                ours = getattr(found, "home", None) is disk.home
                if found is not None and (ours or found is self._given.get(name)):
                    site[0]._parameters[site[1]] = disk if stand_in is None else stand_in  # type: ignore[assignment]
                    continue
                yield name, site, found

    def leave(self, name: str, site: Site) -> None:
        """Bind a weight there no more."""
        self._sites[name].remove(site)

    def occupy(self, name: str, site: Site) -> None:
        """Bind a weight there again."""
        self._sites[name].append(site)

    def is_back(self, name: str, site: Site) -> bool:
        """Whether a weight's placeholder stands there again."""
        return getattr(standing(site), "home", None) is self._disk[name].home

    def stands(self, name: str) -> bool:
        """Whether a weight has a place in the model."""
        return bool(self._sites[name])

    def _follow(self, plan: Plan) -> None:
        """Go over to a plan with less resident, between two passes: what it drops is read every pass from now on."""
        model = self._model()
        assert model is not None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.stream is not None:
            self._waited += self.stream.seconds_waiting
            self.stream.rewind()
            self.stream = None  # the old ring is gone before the new one is made
        self._stand_ins.clear()
        for name in self._sites:
            if name not in plan.resident and name not in self.overrides.held:
                self._bound.pop(name, None)
                self.bind(name, self._disk[name])
        self._given.clear()  # else the old ring stays
        self.overrides.outdated = False
        told = self.plan
        self.plan = replace(
            plan,
            draft=told.draft,
            draft_reason=told.draft_reason,
            predicted_seconds_per_token_drafted=told.predicted_seconds_per_token_drafted,
            fallbacks=told.fallbacks,
        )
        for tell in self.followers:
            tell()
        if plan.streams:
            self._attach(model)

    @property
    def schedule(self) -> Mapping[str, Weight]:
        return self.weights.schedule.weights

    @property
    def seconds_waiting(self) -> float:
        """How long the model stood still for the disk."""
        streams = (self.stream, self.experts)
        return self._waited + sum(stream.seconds_waiting for stream in streams if stream is not None)

    def progress(self) -> tuple[int, int]:
        """Bytes read for the pass under way, and those that it will come to, as far as can be told."""
        done = self.stream.bytes_done if self.stream is not None else 0
        total = self.plan.bytes_streamed_per_pass
        if self.experts is None:
            return done, total
        calls = self.experts.counts.calls - self._before_pass.calls
        read = self.experts.counts.nbytes - self._before_pass.nbytes
        modules = len(self.plan.experts)
        likely = read * modules // calls if 0 < calls <= modules else max(self.plan.expert_bytes_per_token, read)
        return done + read, total + likely

    def bound(self, name: str) -> torch.Tensor:
        """What the modules of a weight hold now."""
        module, attribute, is_buffer = self._sites[name][0]
        tensor = (module._buffers if is_buffer else module._parameters)[attribute]
        assert tensor is not None
        return tensor

    def close(self) -> None:
        """Stop reading. Resident weights stay; a streamed one raises ClosedError from now on."""
        self.readers.close()

    def begin_pass(self) -> None:
        """Called when the model is entered."""
        if not self.plan.streams:
            return
        self.overrides.adopt()
        if self.overrides.outdated:
            self.overrides.outdated = False
            with contextlib.suppress(BudgetError):  # then what is held is streamed as well, and left alone
                self.replan(self.plan.budget)
            if not self.plan.streams:
                return
        if self._pid != os.getpid():
            self._pid = os.getpid()
            if self.stream is not None:
                self.stream.forget()
        self.readers.verify()
        if self.stream is not None:
            self.stream.begin_pass()
        if self.experts is not None:
            self._before_pass = replace(self.experts.counts, tokens={})
        self._in_pass = True

    def end_pass(self) -> None:
        """Called when the model is left, however: after Ctrl-C no weight may stay bound to memory of the ring."""
        self._in_pass = False
        for holders in self._held.values():
            for held in holders:
                for part in held.item.parts:
                    self._unbind(part.weight)
        self._held.clear()
        if self._expert_hooks is not None:
            self._expert_hooks.end_pass()

    def read(self, name: str) -> torch.Tensor:
        """A weight, whole, read now."""
        return self._rows(name, 0, self.schedule[name].rows)

    def current(self, name: str) -> torch.Tensor:
        """A weight as it is now, wherever it is; what is in memory is given as it is there."""
        if name in self.overrides.held:
            return self.overrides.held[name].detach()
        bound = self._bound.get(name)
        if bound is None:
            return self.read(name)
        return bound.decode() if isinstance(bound, Encoded) else bound.detach()

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows of a weight as it is now; None where only all of it can be had.

        Raises:
            TokenError: an id is no row of it.
        """
        weight, bound = self.schedule[name], self.overrides.held.get(name, self._bound.get(name))
        table = weight.shape if bound is None else bound.shape
        if table:
            check_ids(ids, table[0], name, lambda: TOKENS if self._looks_up_tokens(name) else OTHERS)
        if name in self.overrides.held:
            return self.overrides.held[name].detach()[ids]
        if bound is not None:
            return bound.look_up(ids) if isinstance(bound, Encoded) and bound.dim() == 2 else self.current(name)[ids]
        return self.gather(name, ids) if len(weight.shape) == 2 and weight.by_rows else None

    def _looks_up_tokens(self, name: str) -> bool:
        """Whether a weight stands in the module that the model's tokens go into."""
        model = self._model()
        with contextlib.suppress(NotImplementedError):
            table = None if model is None else model.get_input_embeddings()
            return any(module is table for module, _, _ in self._sites[name])
        return False

    def part(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` indices of dimension 0 of a weight as it is now."""
        weight, bound = self.schedule[name], self._bound.get(name)
        if name in self.overrides.held or not weight.shape or (bound is None and not weight.by_rows):
            return self.current(name)[first : first + count] if weight.shape else self.current(name)
        if bound is None:
            return self._rows(name, first, count)
        return bound.part(first, count) if isinstance(bound, Encoded) else bound.detach()[first : first + count]

    def placeholder(self, name: str) -> DiskTensor:
        """What stands in the modules of a weight that is not there."""
        return self._disk[name]

    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table, read from disk.

        Args:
            ids: integer tensor of any shape.

        Returns:
            Tensor of shape (*ids.shape, columns).
        """
        weight = self.schedule[name]
        unique, inverse = torch.unique(ids.to("cpu"), return_inverse=True)
        if weight.convert is Convert.DECODE:
            return self._gather_encoded(weight, unique.tolist())[inverse].to(self.device)
        row = weight.stored_nbytes // weight.rows
        area = Area(len(unique) * row)
        reads = []
        for place, index in enumerate(unique.tolist()):
            for piece in weight.pieces_of_rows(index, 1):
                extent = piece.extent
                at = place * row + piece.at
                reads.append(Read(extent.file, extent.offset, extent.length, at, extent.length, False))
        self.readers.read(reads, area)
        stored = area.tensor[: len(unique) * row].view(self._stored_dtype(weight)).view(len(unique), weight.shape[1])
        rows = self.overrides.arrived(name, stored.to(self.device, _dtype(weight)))
        return rows[inverse.to(self.device)]

    def _gather_encoded(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows of a table that is stored in panels; each of their panels is read for itself."""
        order = self.weights.orders.get(weight.name)
        rows = rows if order is None else order[rows].tolist()
        ranges = [weight.stored_range(row, 1) for row in rows]
        places = list(itertools.accumulate((end - begin for begin, end in ranges), initial=0))
        area = Area(places[-1])
        reads = []
        for row, at in zip(rows, places, strict=False):
            for piece in weight.pieces_of_rows(row, 1):
                extent = piece.extent
                reads.append(Read(extent.file, extent.offset, extent.length, at + piece.at, extent.length, False))
        self.readers.read(reads, area)
        out = torch.empty(len(rows), weight.shape[1], dtype=_dtype(weight))
        for place, row in enumerate(rows):
            memory = area.tensor[places[place] : places[place + 1]]
            out[place] = Encoded((1, weight.shape[1]), out.dtype, memory, weight.spans(row, 1), self._scratch).decode()[
                0
            ]
        return out

    def _disk_tensor(self, name: str) -> DiskTensor:
        """The placeholder of a weight, taught where its data is."""
        module, attribute, is_buffer = self._sites[name][0]
        tensor = (module._buffers if is_buffer else module._parameters)[attribute]
        assert isinstance(tensor, DiskTensor)
        if self.device.type != "cpu":
            placed = tensor.on(self.device)
            for owner, at, buffer in self._sites[name]:
                (owner._buffers if buffer else owner._parameters)[at] = placed  # type: ignore[assignment]
            tensor = placed
        tensor.home = Home(self, name)
        return tensor

    def _attach(self, model: PreTrainedModel) -> None:
        """Hooks for the units, stand-ins for what is served in blocks."""
        device = device_for(self.device)
        self._attach_experts(model, device)
        if not self.plan.steps:
            return
        self.stream = Stream(self.plan, self.readers, device, self._cached())
        blocked: dict[str, int] = defaultdict(int)
        for item in self.plan.items:
            blocked[item.module] = max(blocked[item.module], item.block)
        for name, last in blocked.items():
            module = model.get_submodule(name)
            if last:
                self._serve_in_blocks(name, [item for item in self.plan.items if item.module == name])
            else:
                self._handles.append(module.register_forward_pre_hook(self._entering(name, module)))
                self._handles.append(module.register_forward_hook(self._leaving(name, module), always_call=True))
        self.stream.pump()

    def _cached(self) -> dict[int, torch.Tensor]:
        """Host copies of the items that only cross to the device."""
        cached = {}
        for index, item in enumerate(self.plan.items):
            if item.cached:
                area = Area(item.nbytes)
                self.readers.read(item.layout.reads, area)
                cached[index] = area.tensor
        return cached

    def _asked(self, name: str) -> bool:
        """Whether a weight takes gradients: torch picks kernels by that even where there are none."""
        return self._disk[name].requires_grad

    def _entering(self, name: str, module: nn.Module) -> Callable[..., None]:
        def enter(entered: nn.Module, *_: object) -> None:
            if entered is not module:  # a copy, which has weights of its own
                return
            held = self._acquire(name, 0)
            if held is None:
                return
            self._held[name].append(held)
            for placed in held.item.layout.placed:
                if placed.part.weight not in self.overrides.held:
                    weight = self.finish(placed, held.memory)
                    self.bind(placed.part.weight, guarded(weight))

        return enter

    def _leaving(self, name: str, module: nn.Module) -> Callable[..., None]:
        def leave(left: nn.Module, *_: object) -> None:
            if left is not module or not self._held[name]:
                return
            held = self._held[name].pop()
            written = [part.weight for part in held.item.parts if not self._unbind(part.weight)]
            assert self.stream is not None
            self.stream.release(held)
            if written:
                raise UnsupportedError(
                    f"{name} writes to {written[0]} while it runs, which a weight that streams cannot keep: give "
                    f"enough memory for it to stay (lamina plan says how much)"
                )

        return leave

    def _unbind(self, name: str) -> bool:
        """Put the placeholder back; False where what was bound has been written to."""
        if name in self.overrides.held or not self._sites[name]:
            return True
        bound = self.bound(name)
        unwritten = bound.is_inference() or bound._version == 0
        self.bind(name, self._disk[name])
        return unwritten

    def _acquire(self, module: str, block: int) -> Held | None:
        assert self.stream is not None
        self.lock.check()
        held = self.stream.acquire(module, block)
        if held is None and not self._in_pass:  # a part of the model, called on its own and not for the first time
            self.stream.begin_pass()
            held = self.stream.acquire(module, block)
        return held

    def bind(self, name: str, tensor: torch.Tensor | None) -> None:
        """Give the modules of a weight this tensor."""
        if tensor is not self._disk[name]:
            self._given[name] = tensor
        for module, attribute, _ in self._sites[name]:
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def _serve_in_blocks(self, module: str, items: list[Item]) -> None:
        for weight in dict.fromkeys(part.weight for part in items[0].parts):
            stand_in = Blocks(self._disk[weight])
            stand_in.linear = self._linear_in_blocks(module, items)
            self._stand_in(weight, stand_in)

    def _stand_in(self, weight: str, stand_in: Blocks) -> None:
        self._stand_ins[weight] = stand_in.requires_grad_(self._asked(weight))  # type: ignore[assignment]
        for owner, attribute, _ in self._sites[weight]:
            held: object = owner._parameters[attribute]
            if held is self._disk[weight] and not isinstance(owner, nn.Embedding):
                owner._parameters[attribute] = stand_in  # type: ignore[assignment]

    def _linear_in_blocks(
        self, module: str, items: list[Item]
    ) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        weight = self.schedule[items[0].parts[0].weight]
        order = self.weights.orders.get(weight.name)

        def linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = x.new_empty(*x.shape[:-1], weight.rows)
            if order is not None and bias is not None:
                bias = bias[torch.argsort(order)]  # of the rows as they are stored
            for item in items:
                part = item.parts[0]
                rows = slice(part.first, part.first + part.count)
                held = self._acquire(module, item.block)
                block = self._block(item) if held is None else self.finish(held.item.layout.placed[0], held.memory)
                out[..., rows] = product(x, block, None if bias is None else bias[rows])
                if held is not None:
                    assert self.stream is not None
                    self.stream.release(held)
            return out if order is None else out[..., order]

        return linear

    def _attach_experts(self, model: PreTrainedModel, device: Device | None) -> None:
        """Hooks that tell which experts a call is routed to, and stand-ins that give one at a time."""
        plan = self.plan
        if self.experts is not None:
            self.experts.shrink(plan.expert_slots, plan.device_expert_slots)
        elif plan.experts:
            self.experts = ExpertStream(plan.experts, plan.expert_slots, plan.expert_slot_bytes, self.readers, device,
                                        plan.device_expert_slots)  # fmt: skip
        if self.experts is None:
            return
        hooks = self._expert_hooks = ExpertHooks(self.experts, self.finish)
        if self.foresee and not plan.steps:  # where dense weights stream the drive is never idle
            streamed = [name for name in self.schedule if name not in plan.resident]
            self._handles += hooks.foresee(model, plan.experts, self.weights.routers, streamed)
        self._handles += hooks.attach(model, plan.experts)
        for experts in plan.experts:
            for weight in experts.weights:
                self._stand_in(weight.name, hooks.stand_in(experts.module, weight, self._disk[weight.name]))

    def _block(self, item: Item) -> torch.Tensor:
        area = Area(item.nbytes)
        self.readers.read(item.layout.reads, area)
        return self.finish(item.layout.placed[0], area.tensor).to(self.device)

    def _stored_dtype(self, weight: Weight) -> torch.dtype:
        return self.weights.stored_dtypes.get(weight.name, _dtype(weight))

    def finish(self, placed: Placed, memory: torch.Tensor) -> torch.Tensor:
        """The tensor of a part whose stored bytes are in `memory`."""
        weight = self.schedule[placed.part.weight]
        shape = weight.shape if placed.part.count == weight.rows else (placed.part.count, *weight.shape[1:])
        if weight.convert is Convert.DECODE:
            return self._encoded(weight, placed, shape, memory)
        final = memory[placed.at : placed.at + placed.nbytes].view(_dtype(weight)).view(shape)
        if weight.convert is not Convert.NONE:
            self._convert(weight, memory[placed.stored_at : placed.stored_at + placed.stored_nbytes], final)
        final = self.overrides.arrived(weight.name, final).data  # counts from now on what is written to it
        # torch picks kernels by this flag even under no_grad (matmul folds): plain transformers has it set
        return final.requires_grad_(self._asked(weight.name) and _differentiable(final))

    def _convert(self, weight: Weight, stored: torch.Tensor, final: torch.Tensor) -> None:
        if weight.convert is Convert.CAST:
            final.copy_(stored.view(self._stored_dtype(weight)).view(final.shape))
        else:
            final.copy_(self.weights.replays[weight.name](stored))

    def _encoded(self, weight: Weight, placed: Placed, shape: tuple[int, ...], memory: torch.Tensor) -> Encoded:
        part = placed.part
        stored = memory[placed.stored_at : placed.stored_at + placed.stored_nbytes]
        whole = self.weights.replays.get(weight.name)
        order = self.weights.orders.get(weight.name) if part.count == weight.rows else None
        return Encoded(shape, _dtype(weight), stored, weight.spans(part.first, part.count), self._scratch, whole, order)


def _dtype(weight: Weight) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, weight.dtype)
    return dtype


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that transformers computed (rotary frequencies, masks) go where the model computes."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, torch.Tensor) and not isinstance(buffer, DiskTensor):
                module._buffers[name] = buffer.to(device)


def standing(site: Site) -> torch.Tensor | None:
    """What a module holds there now; None where it has no such parameter any more."""
    module, attribute, is_buffer = site
    return (module._buffers if is_buffer else module._parameters).get(attribute)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes: a NaN is itself."""
    if not one.numel():
        return True
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _sites(model: nn.Module) -> Sites:
    """Where each weight sits: every module and attribute that holds it, tied ones included."""
    first: dict[int, str] = {}
    sites: Sites = defaultdict(list)
    for prefix, module in model.named_modules():
        for is_buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for attribute, tensor in tensors.items():
                if isinstance(tensor, DiskTensor):
                    name = first.setdefault(id(tensor), f"{prefix}.{attribute}".lstrip("."))
                    sites[name].append((module, attribute, is_buffer))
    return dict(sites)
