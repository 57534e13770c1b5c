"""One model under one plan: what is resident, what streams, and how to change to another plan.

Resident weights are ordinary parameters and cost nothing. What streams is bound by `lamina.runtime.binder`. What the
plan did not expect (a weight touched out of order, by the user, or by a branch that the trace did not take) is read on
demand: slow, but right.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamina.errors import BudgetError, UnsupportedError
from lamina.hf.names import PreTrainedModel
from lamina.host import watching_forks
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan
from lamina.plan.schedule import Weight
from lamina.progress import Progress
from lamina.runtime.binder import Binder
from lamina.stream.experts import ExpertStream
from lamina.stream.observe import LAMINA, timed
from lamina.stream.readers import Readers
from lamina.stream.stream import Stream
from lamina.tensors.packed import PackedTensor
from lamina.weights.describe import Weights
from lamina.weights.materialize import Materializer, is_differentiable, load_residents
from lamina.weights.sites import Site, WeightSites, move_buffers
from lamina.weights.values import Home, Overrides, Values


class Engine:
    """One model, one plan, one stream.

    Args:
        model: built on DiskTensors.
        weights: its schedule, with what turns stored bytes into tensors.
        plan: what lives where.
        device: where the model computes.
        readers: the reader threads; closed with the engine.
        prefetch: read likely experts before their router has chosen, as the router before it predicts them.

    Attributes:
        sites: where the weights stand in the model.
        materializer: makes tensors of stored bytes.
        values: the weights as they are now.
        binder: binds what streams.
        overrides: the weights that were written to.
        lock: one thread at a time runs the model.
        followers: called when the plan is another one: weights are no longer where they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        plan: Plan,
        device: torch.device,
        readers: Readers,
        prefetch: bool = True,
    ) -> None:
        self._plan, self.weights, self.device, self.readers = plan, weights, device, readers
        self.lock = Turn()
        self.followers: list[Callable[[], None]] = []
        self._model = weakref.ref(model)
        self.sites = WeightSites(model, device, lambda name: Home(self, name))
        self.overrides = Overrides(self)
        self.materializer = Materializer(weights, readers, device, self.overrides.arrived, self.sites.asked)
        self.values = Values(model, self.schedule, self.sites, self.materializer, self.overrides.held)
        self.binder = Binder(weights, readers, self.sites, self.materializer, self.overrides, self.lock.check, prefetch)

    def start(self, model: PreTrainedModel, progress: Progress | None = None) -> None:
        """Read the resident weights, bind them, and let the stream run ahead."""
        resident = [self.schedule[name] for name in self.schedule if name in self.plan.resident]
        if self.device.type != "cpu":
            move_buffers(model, self.device)
        found = load_residents(resident, self.readers, self.materializer.finish, self.device, progress)
        for name, tensor in found.items():
            parameter = tensor
            if isinstance(tensor, PackedTensor):
                tensor.home = self.sites.placeholder(name).home
            else:
                parameter = nn.Parameter(tensor, requires_grad=is_differentiable(tensor))
            self.values.resident[name] = parameter
            self.sites.settle(name, parameter, tensor)
        if self.plan.streams:
            self.binder.attach(model, self.plan, self.device)

    @property
    def plan(self) -> Plan:
        """What lives where."""
        return self._plan

    def revise(self, **facts: Any) -> None:
        """Change facts in the plan for which nothing has to move.

        Args:
            facts: fields of `Plan`: what was measured or chosen, or a budget that the same plan keeps.
        """
        self._plan = replace(self._plan, **facts)

    def close(self) -> None:
        """Stop reading. Resident weights stay; a streamed one raises ClosedError from now on."""
        self.readers.close()
        self.binder.close()

    # -- a pass

    @timed(LAMINA)
    def begin_pass(self) -> None:
        """Called when the model is entered.

        Raises:
            BudgetError: what the user put in place of streamed weights has no room.
        """
        if not self.plan.streams:
            return
        self.overrides.adopt()
        if self.overrides.outdated:
            self.overrides.outdated = False
            with contextlib.suppress(BudgetError):  # then what is held is streamed as well, and left alone
                self.replan(self.plan.budget)
            if not self.plan.streams:
                return
        self.binder.begin_pass()

    @timed(LAMINA)
    def end_pass(self) -> None:
        """Called when the model is left, however."""
        self.binder.end_pass()

    @property
    def in_pass(self) -> bool:
        """Whether the model is running."""
        return self.binder.in_pass

    @property
    def stream(self) -> Stream | None:
        """The stream of dense weights; None while none streams."""
        return self.binder.stream

    @property
    def experts(self) -> ExpertStream | None:
        """The stream of experts; None where all of them stay, or there are none."""
        return self.binder.experts

    @property
    def schedule(self) -> Mapping[str, Weight]:
        """The weights by name."""
        return self.weights.schedule.weights

    @property
    def seconds_waiting(self) -> float:
        """How long the model stood still for the disk."""
        return self.binder.seconds_waiting

    def progress(self) -> tuple[int, int]:
        """Bytes read for the pass under way, and the estimated bytes of the whole pass."""
        return self.binder.progress(self.plan)

    # -- another plan

    def foreign(self) -> Iterator[tuple[str, Site, torch.Tensor | None]]:
        """Places of streamed weights where the user put another tensor, or took the parameter away."""
        return self.sites.foreign(self.plan.resident, self.overrides.held)

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
            dropped = (self.plan.resident & self.values.resident.keys()) - plan.resident - kept.keys() - set(without)
            written = self.values.written(dropped)
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
            self.revise(budget=budget)
            return
        for times in (8, 2, 1):  # more are likely to follow: a plan for each of them would take long
            with contextlib.ExitStack() as stack:
                if times > 1:
                    stack.enter_context(contextlib.suppress(BudgetError))
                self.replan(replace(budget, override_bytes=budget.override_bytes + (times - 1) * nbytes), without)
                self.revise(budget=budget)
                return

    def _follow(self, plan: Plan) -> None:
        """Go over to a plan with less resident, between two passes: what it drops is read every pass from now on."""
        model = self._model()
        assert model is not None
        self.binder.detach()
        dropped = [name for name in self.sites if name not in plan.resident and name not in self.overrides.held]
        for name in dropped:
            self.values.resident.pop(name, None)
        self.sites.clear(dropped)  # and keep hold of nothing, else the old ring stays
        self.overrides.outdated = False
        self._plan = replace(plan, fallbacks=self.plan.fallbacks)
        for tell in self.followers:
            tell()
        if plan.streams:
            self.binder.attach(model, plan, self.device)


class Turn:
    """One thread at a time runs a model: a lock that a thread may take again while it has it.

    `os.fork` copies memory and locks, but of the threads only the one that forked. A child that was forked between two
    passes, or by the thread that is in one, has all that it needs. One that was forked while another thread was in a
    pass has a pass that never ends, and weights bound for it: the model cannot be used there, and raises an error.

    Raises, when it is entered:
        UnsupportedError: in a child that was forked while another thread had it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._lost = False
        _living.add(self)

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise what `__enter__` raises, without waiting."""
        if self._lost:
            raise UnsupportedError(
                "this process was forked while another thread ran the model, so that half a pass is all it has of it: "
                "load the model in the child, or start processes by multiprocessing's 'spawn'"
            )

    def after_fork(self) -> None:
        """In a child, before anything else runs there: whose turn is it?"""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lost = True


_living = watching_forks(after_in_child=Turn.after_fork)
