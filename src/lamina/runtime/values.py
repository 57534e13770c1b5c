"""Weights as they are now, for whoever asks outside of a pass: held, resident, or read from disk."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Mapping

import torch

from lamina.hf.names import PreTrainedModel
from lamina.plan.schedule import Weight
from lamina.runtime.materialize import Materializer, dtype_of
from lamina.runtime.residents import AT_ONCE
from lamina.runtime.sites import WeightSites, standing
from lamina.tensors.ids import OTHERS, TOKENS, check_ids
from lamina.tensors.packed import Encoded


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
        return bound.decode() if isinstance(bound, Encoded) else bound.detach()

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
            return bound.look_up(ids) if isinstance(bound, Encoded) and bound.dim() == 2 else self.current(name)[ids]
        return self._materializer.gather(name, ids) if len(weight.shape) == 2 and weight.by_rows else None

    def part(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` indices of dimension 0 of a weight as it is now."""
        weight, bound = self._schedule[name], self.resident.get(name)
        if name in self._held or not weight.shape or (bound is None and not weight.by_rows):
            return self.current(name)[first : first + count] if weight.shape else self.current(name)
        if bound is None:
            return self._materializer.rows(name, first, count)
        return bound.part(first, count) if isinstance(bound, Encoded) else bound.detach()[first : first + count]

    def written(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Of these resident weights those that are others than the disk holds."""
        return {name: self.resident[name] for name in sorted(names) if self._was_written(name)}

    def _was_written(self, name: str) -> bool:
        bound = self.resident[name]
        if isinstance(bound, Encoded):
            return False  # whoever writes to it has made it an override
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
