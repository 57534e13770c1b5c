"""Weights outside of a pass: their present values, and what becomes of those that are written to.

A weight is held, resident, or read from disk. Merging an adapter, loading a state dict, initialising a layer anew: all
of it writes to weights. What was written is kept whole, as an ordinary parameter, and counts against the budget: other
weights give way to it, or it is refused. A multiplication by a number needs no memory: it is done again whenever the
weight arrives.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from lamina.errors import BudgetError, UnsupportedError
from lamina.hf.names import PreTrainedModel
from lamina.plan.schedule import Convert, Weight
from lamina.tensors.ids import OTHERS, TOKENS, check_ids
from lamina.tensors.packed import PackedTensor
from lamina.weights.materialize import AT_ONCE, Materializer, dtype_of
from lamina.weights.sites import Site, WeightSites, standing

Scaling = Callable[..., Any]


class Values:
    """The weights of one model by name, wherever they are.

    Args:
        model: whose weights they are.
        schedule: the weights by name.
        sites: where they stand.
        materializer: reads what is not in memory.
        held: by name, what is held in place of what is on disk.

    Attributes:
        resident: by name, what stands in the modules of a resident weight.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: Mapping[str, Weight],
        sites: WeightSites,
        materializer: Materializer,
        held: Mapping[str, torch.Tensor],
    ) -> None:
        self._model = weakref.ref(model)
        self._schedule, self._sites, self._materializer, self._held = schedule, sites, materializer, held
        self.resident: dict[str, torch.Tensor] = {}

    def current(self, name: str) -> torch.Tensor:
        """A weight as it is now; what is in memory is given as it is there."""
        if name in self._held:
            return self._held[name].detach()
        bound = self.resident.get(name)
        if bound is None:
            return self._materializer.read(name)
        return bound.unpack() if isinstance(bound, PackedTensor) else bound.detach()

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows of a weight as it is now; None where only all of it can be had.

        Args:
            ids: integer tensor of any shape.

        Returns:
            Tensor of shape (*ids.shape, columns).

        Raises:
            TokenError: an id is no row of it.
        """
        weight, bound = self._schedule[name], self._held.get(name, self.resident.get(name))
        table = weight.shape if bound is None else bound.shape
        if table:
            check_ids(ids, table[0], name, lambda: TOKENS if self._looks_up_tokens(name) else OTHERS)
        if name in self._held:
            return self._held[name].detach()[ids]
        if bound is not None:
            return (
                bound.look_up(ids) if isinstance(bound, PackedTensor) and bound.dim() == 2 else self.current(name)[ids]
            )
        return self._materializer.gather(name, ids) if len(weight.shape) == 2 and weight.by_rows else None

    def part(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` indices of dimension 0 of a weight as it is now."""
        weight, bound = self._schedule[name], self.resident.get(name)
        if name in self._held or not weight.shape or (bound is None and not weight.by_rows):
            return self.current(name)[first : first + count] if weight.shape else self.current(name)
        if bound is None:
            return self._materializer.rows(name, first, count)
        return bound.part(first, count) if isinstance(bound, PackedTensor) else bound.detach()[first : first + count]

    def written(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Of these resident weights those that are others than the disk holds."""
        return {name: self.resident[name] for name in sorted(names) if self._was_written(name)}

    def _was_written(self, name: str) -> bool:
        bound = self.resident[name]
        if isinstance(bound, PackedTensor):
            return False  # a weight that was written to is an override
        if any(standing(site) is not bound for site in self._sites.of(name)):
            return True
        weight = self._schedule[name]
        if bound.shape != weight.shape or bound.dtype != dtype_of(weight):
            return True
        rows = (
            max(AT_ONCE * weight.rows // max(weight.nbytes, 1), 1) if weight.by_rows and weight.shape else weight.rows
        )
        for first in range(0, max(weight.rows, 1), rows):
            part = bound.detach()[first : first + rows] if weight.shape else bound.detach()
            if not same_bits(part, self._materializer.rows(name, first, min(rows, weight.rows - first))):
                return True
        return False

    def _looks_up_tokens(self, name: str) -> bool:
        """Whether a weight stands in the module that the model's tokens go into."""
        model = self._model()
        with contextlib.suppress(NotImplementedError):
            table = None if model is None else model.get_input_embeddings()
            return any(module is table for module, _, _ in self._sites.of(name))
        return False


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes: a NaN is itself."""
    if not one.numel():
        return True
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


class Owner(Protocol):
    """What overrides ask of the engine whose weights they are; `lamina.runtime.engine.Engine` says what each does."""

    overrides: Overrides
    sites: WeightSites
    values: Values

    @property
    def lock(self) -> AbstractContextManager[None]:
        """One thread at a time runs the model, or writes to it."""

    @property
    def in_pass(self) -> bool:
        """See `Engine.in_pass`."""

    @property
    def schedule(self) -> Mapping[str, Weight]:
        """The weights of the model, by name."""

    def foreign(self) -> Iterator[tuple[str, Site, torch.Tensor | None]]:
        """See `Engine.foreign`."""

    def spend(self, nbytes: int, without: Collection[str]) -> None:
        """See `Engine.spend`."""


class Overrides:
    """The written weights of one engine.

    Attributes:
        held: by name, what stands in the modules.
        scaled: by name, what is done to a weight whenever it arrives: in-place operations and their numbers.
        gone: names of weights that no module holds any more; their placeholders still read them.
        outdated: the plan still streams weights that are held or gone.
    """

    def __init__(self, engine: Owner) -> None:
        self._engine = engine
        self.held: dict[str, nn.Parameter] = {}
        self.scaled: dict[str, list[tuple[Scaling, float]]] = defaultdict(list)
        self.gone: set[str] = set()
        self.outdated = False
        self._reserved: set[str] = set()  # there is room for them already
        self._left: list[tuple[str, Site, int]] = []  # places that the user filled, and bytes of what is there

    def written(self, name: str) -> torch.Tensor:
        """The memory of a weight, to be written to.

        Raises:
            BudgetError: there is no room for it.
            UnsupportedError: a pass is under way.
        """
        with self._engine.lock:
            if name not in self.held:
                self.make_room([name])
                self._hold(name, self._engine.values.current(name))
            return self.held[name].detach()

    def replace(self, name: str, data: torch.Tensor) -> None:
        """Let `data` be the weight, in any shape and dtype.

        Raises:
            BudgetError: there is no room for it.
            UnsupportedError: a pass is under way.
        """
        with self._engine.lock:
            if name in self.held:
                self._engine.spend(data.nbytes - self.held[name].nbytes, without=())
                self.held[name].data = data
                return
            self.make_room([name], data.nbytes)
            self._hold(name, data)

    def scale(self, name: str, func: Scaling, number: float) -> bool:
        """Multiply or divide a weight by a number each time it arrives; False where it has to be held instead."""
        with self._engine.lock:
            weight = self._engine.schedule[name]
            if name in self.held or weight.convert is Convert.UNPACK:
                return False
            if not self._engine.sites.placeholder(name).is_floating_point():
                return False
            if number != 1:
                self.scaled[name].append((func, number))
            return True

    def arrived(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight, or rows of it, as it should be by now; written in place."""
        for func, number in self.scaled.get(name, ()):
            func(weight, number)
        return weight

    def make_room(self, names: Collection[str], nbytes: int | None = None) -> None:
        """Have memory for weights that are about to be held.

        Args:
            names: of weights; those that are held already need none.
            nbytes: of all of them, where it is not what they have.

        Raises:
            BudgetError: not even the smallest plan leaves so much.
            UnsupportedError: a pass is under way.
        """
        engine = self._engine
        new = [name for name in names if name not in self.held and name not in self._reserved]
        if not new:
            return
        if engine.in_pass:
            raise UnsupportedError(
                f"{new[0]} streams and was written to while the model runs: what is on disk would come back with the "
                f"next pass; write to it before, or give enough memory for it to stay"
            )
        if nbytes is None:
            nbytes = sum(engine.schedule[name].unpacked_nbytes for name in new)
        engine.spend(nbytes, without=new)
        self._reserved.update(new)
        self.outdated = True

    def keep(self, name: str, weight: torch.Tensor) -> None:
        """Hold what stands in the modules of a resident weight already."""
        self.held[name] = weight  # type: ignore[assignment]

    def adopt(self) -> None:
        """Leave alone what the user put in place of a streamed weight, and count it; take back what was put back.

        Raises:
            BudgetError: there is no room for it.
        """
        engine = self._engine
        for name, site, nbytes in tuple(self._left):
            if engine.sites.is_back(name, site):
                engine.sites.occupy(name, site)
                self._left.remove((name, site, nbytes))
                self.gone.discard(name)
                engine.spend(-nbytes, without=())
                self.outdated = True
        found = list(engine.foreign())
        memory = {id(each): each.nbytes for _, _, each in found if each is not None and not hasattr(each, "home")}
        for name, site, _ in found:  # before a plan is made anew, which would bind there again
            engine.sites.leave(name, site)
        try:
            engine.spend(sum(memory.values()), without=())
        except BudgetError:
            for name, site, _ in found:
                engine.sites.occupy(name, site)
            raise
        for name, site, each in found:
            self._left.append((name, site, memory.pop(id(each), 0)))
            if not engine.sites.stands(name):
                self.gone.add(name)
                self.outdated = True

    def _hold(self, name: str, data: torch.Tensor) -> None:
        self.scaled.pop(name, None)  # `data` has been scaled
        if data.is_inference():
            data = data.clone()
        asked = self._engine.sites.placeholder(name).requires_grad and (data.is_floating_point() or data.is_complex())
        self._reserved.discard(name)
        self.held[name] = parameter = nn.Parameter(data, requires_grad=asked)
        self._engine.sites.bind(name, parameter)


class Home:
    """Where the data of one weight of an engine is; see `lamina.tensors.disk.WeightHome`."""

    def __init__(self, engine: Owner, name: str) -> None:
        self._engine, self.name = engine, name

    def read(self) -> torch.Tensor:
        """See `lamina.tensors.disk.WeightHome.read`."""
        return self._engine.values.current(self.name)

    def gather(self, ids: torch.Tensor) -> torch.Tensor | None:
        """See `lamina.tensors.disk.WeightHome.gather`."""
        return self._engine.values.rows(self.name, ids)

    def part(self, first: int, count: int) -> torch.Tensor:
        """See `lamina.tensors.disk.WeightHome.part`."""
        return self._engine.values.part(self.name, first, count)

    def written(self) -> torch.Tensor:
        """See `lamina.tensors.disk.WeightHome.written`."""
        return self._engine.overrides.written(self.name)

    def scale(self, func: Scaling, number: float) -> bool:
        """See `lamina.tensors.disk.WeightHome.scale`."""
        return self._engine.overrides.scale(self.name, func, number)

    def replace(self, data: torch.Tensor) -> None:
        """See `lamina.tensors.disk.WeightHome.replace`."""
        if getattr(data, "home", None) is self:  # what it holds already
            return
        self._engine.overrides.replace(self.name, data)
