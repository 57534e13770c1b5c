"""Binds what streams: weights are in their modules exactly while the modules run.

A streamed unit is bound by a hook when its module is entered and unbound when it is left. What is too large to be bound
whole, and experts, have stand-ins that give one part after the other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamina.errors import UnsupportedError
from lamina.plan.layout import Item
from lamina.plan.plan import Plan
from lamina.runtime.expert_hooks import ExpertHooks
from lamina.stream.device import Device, device_for
from lamina.stream.experts import Counts, ExpertStream
from lamina.stream.observe import LAMINA, timed
from lamina.stream.readers import Readers
from lamina.stream.stream import Held, Stream
from lamina.tensors.guard import guarded
from lamina.tensors.padded_rows import product
from lamina.tensors.row_blocks import Blocks
from lamina.weights.describe import Weights
from lamina.weights.materialize import Materializer
from lamina.weights.sites import WeightSites
from lamina.weights.values import Overrides


class Binder:
    """The hooks of one model, the stand-ins in it, and the streams that they take from.

    Args:
        weights: the model's schedule.
        readers: the reader threads.
        sites: where the weights stand.
        materializer: makes tensors of what the streams give.
        overrides: the weights that are held in place of what is on disk.
        check: raises where the model may not run in this process.
        prefetch: read likely experts before their router has chosen, as the router before it predicts them.

    Attributes:
        stream: of dense weights; None while none streams.
        experts: the stream of experts; None where all of them stay, or there are none.
        handles: of the hooks.
        in_pass: whether the model is running.
    """

    def __init__(
        self,
        weights: Weights,
        readers: Readers,
        sites: WeightSites,
        materializer: Materializer,
        overrides: Overrides,
        check: Callable[[], None],
        prefetch: bool,
    ) -> None:
        self._weights, self._readers, self._sites, self._overrides = weights, readers, sites, overrides
        self._materializer, self._check, self._prefetch = materializer, check, prefetch
        self.stream: Stream | None = None
        self.experts: ExpertStream | None = None
        self.expert_hooks: ExpertHooks | None = None
        self.handles: list[Any] = []
        self.in_pass = False
        self._device: Device | None = None
        self._held: dict[str, list[Held]] = defaultdict(list)
        self._pid = os.getpid()
        self._waited = 0.0  # in streams that are no more
        self._before_pass = Counts()

    def begin_pass(self) -> None:
        """The model is entered: the stream goes to its start.

        Raises:
            ChangedError: a file is not what its header was read from.
        """
        self.check_process()
        if self._pid != os.getpid():
            self._pid = os.getpid()
            if self.stream is not None:
                self.stream.forget()
        self._readers.verify()
        if self.stream is not None:
            self.stream.begin_pass()
        if self.experts is not None:
            self._before_pass = replace(self.experts.counts, tokens={})
        self.in_pass = True

    def check_process(self) -> None:
        """Refuse an accelerator in a forked process, before anything is asked of it."""
        if self._device is not None and self._pid != os.getpid():
            raise UnsupportedError(
                "this process was forked after the model was loaded, and no accelerator can be used in a forked "
                "process: load the model in the child, or start processes by multiprocessing's 'spawn'"
            )

    def end_pass(self) -> None:
        """The model is left, however: after Ctrl-C no weight may stay bound to memory of the ring."""
        self.in_pass = False
        for holders in self._held.values():
            for held in holders:
                for part in held.item.parts:
                    self._unbind(part.weight)
        self._held.clear()
        if self.expert_hooks is not None:
            self.expert_hooks.end_pass()

    def attach(self, model: nn.Module, plan: Plan, device: torch.device) -> None:
        """Put hooks for the units and stand-ins for what is served in parts into the model; let the stream run ahead.

        Args:
            plan: what streams, and in which order.
            device: where the model computes.
        """
        if self._device is None:
            self._device = device_for(device)
        self._attach_experts(model, plan, self._device)
        if not plan.items:
            return
        cached = {index: item for index, item in enumerate(plan.items) if item.cached}
        self.stream = Stream(plan, self._readers, self._device, self._materializer.stored_together(cached))
        blocked: dict[str, int] = defaultdict(int)
        for item in plan.items:
            blocked[item.module] = max(blocked[item.module], item.block)
        for name, last in blocked.items():
            module = model.get_submodule(name)
            if last:
                self._serve_in_blocks(name, [item for item in plan.items if item.module == name])
            else:
                self.handles.append(module.register_forward_pre_hook(self._entering(name, module)))
                self.handles.append(module.register_forward_hook(self._leaving(name, module), always_call=True))
        self.stream.pump()

    def detach(self) -> None:
        """Take the hooks out, and give the stream up; that of experts stays for the next plan."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.stream is not None:
            self._waited += self.stream.seconds_waiting
            self.stream.rewind()
            self.stream.close()
            self.stream = None  # the old ring is gone before the new one is made

    def close(self) -> None:
        """Wait for copies to the device and let its driver go; what is bound stays so."""
        if self._device is not None and self._pid == os.getpid():
            for stream in (self.stream, self.experts):
                if stream is not None:
                    stream.close()

    @property
    def fallbacks(self) -> Sequence[str]:
        """What the device does another way, with its reason."""
        return self._device.fallbacks if self._device is not None else ()

    @property
    def seconds_waiting(self) -> float:
        """How long the model stood still for the disk."""
        streams = (self.stream, self.experts)
        return self._waited + sum(stream.seconds_waiting for stream in streams if stream is not None)

    def progress(self, plan: Plan) -> tuple[int, int]:
        """Bytes read for the pass under way, and the estimated bytes of the whole pass."""
        done = self.stream.bytes_done if self.stream is not None else 0
        total = plan.bytes_streamed_per_pass
        if self.experts is None:
            return done, total
        calls = self.experts.counts.calls - self._before_pass.calls
        read = self.experts.counts.nbytes - self._before_pass.nbytes
        modules = len(plan.experts)
        likely = read * modules // calls if 0 < calls <= modules else max(plan.expert_bytes_per_token, read)
        return done + read, total + likely

    def _entering(self, name: str, module: nn.Module) -> Callable[..., None]:
        @timed(LAMINA, f"hook {name}")
        def enter(entered: nn.Module, *_: object) -> None:
            if entered is not module:  # a copy, which has weights of its own
                return
            held = self._acquire(name, 0)
            if held is None:
                return
            self._held[name].append(held)
            for placed in held.item.layout.placed:
                if placed.part.weight not in self._overrides.held:
                    weight = self._materializer.finish(placed, held.memory)
                    self._sites.bind(placed.part.weight, guarded(weight))

        return enter

    def _leaving(self, name: str, module: nn.Module) -> Callable[..., None]:
        @timed(LAMINA, f"hook {name}")
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
        if name in self._overrides.held or not self._sites.stands(name):
            return True
        return self._sites.unbind(name)

    @timed(LAMINA)
    def _acquire(self, module: str, block: int) -> Held | None:
        assert self.stream is not None
        self._check()
        held = self.stream.acquire(module, block)
        alone = not (self.in_pass or self.stream.in_branch or any(self._held.values()))
        if held is None and alone:  # a part of the model, called on its own and not for the first time
            self.stream.begin_pass()
            held = self.stream.acquire(module, block)
        return held

    def _serve_in_blocks(self, module: str, items: list[Item]) -> None:
        for weight in dict.fromkeys(part.weight for part in items[0].parts):
            stand_in = Blocks(self._sites.placeholder(weight))
            stand_in.linear = self._linear_in_blocks(module, items)
            self._sites.stand_in(weight, stand_in)

    def _linear_in_blocks(
        self, module: str, items: list[Item]
    ) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        weight = self._weights.schedule.weights[items[0].parts[0].weight]
        order = self._weights.orders.get(weight.name)

        def linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = x.new_empty(*x.shape[:-1], weight.rows)
            if order is not None and bias is not None:
                bias = bias[torch.argsort(order)]  # of the rows as they are stored
            for item in items:
                part = item.parts[0]
                rows = slice(part.first, part.first + part.count)
                held = self._acquire(module, item.block)
                if held is None:
                    block = self._materializer.block(item)
                else:
                    block = self._materializer.finish(held.item.layout.placed[0], held.memory)
                out[..., rows] = product(x, block, None if bias is None else bias[rows])
                if held is not None:
                    assert self.stream is not None
                    self.stream.release(held)
            return out if order is None else out[..., order]

        return linear

    def _attach_experts(self, model: nn.Module, plan: Plan, device: Device | None) -> None:
        """Hooks that tell which experts a call is routed to, and stand-ins that give one at a time."""
        if self.experts is not None:
            self.experts.shrink(plan.expert_slots, plan.device_expert_slots)
        elif plan.experts:
            self.experts = ExpertStream(plan.experts, plan.expert_slots, plan.expert_slot_bytes, self._readers, device,
                                        plan.device_expert_slots)  # fmt: skip
        if self.experts is None:
            return
        hooks = self.expert_hooks = ExpertHooks(self.experts, self._materializer.finish)
        if self._prefetch and not plan.steps:  # where dense weights stream the drive is never idle
            streamed = [name for name in self._weights.schedule.weights if name not in plan.resident]
            self.handles += hooks.prefetch(model, plan.experts, self._weights.routers, streamed)
        self.handles += hooks.attach(model, plan.experts)
        for experts in plan.experts:
            for weight in experts.weights:
                disk = self._sites.placeholder(weight.name)
                self._sites.stand_in(weight.name, hooks.stand_in(experts.module, weight, disk))
