"""A second model in the same process, all of it in memory: what a draft runs on.

It is planned before the target, so that the target's plan leaves room for it, and read after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from lamina.errors import CheckpointError
from lamina.hf.arguments import ordinarily
from lamina.hf.names import PreTrainedModel
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan, resident_size
from lamina.progress import Progress
from lamina.runtime.engine import Engine
from lamina.runtime.load import Described, Encode, describe_model
from lamina.stream.readers import Readers
from lamina.tensors.packed import PackedTensor

EVERYTHING = 1 << 62  # bytes, so that a plan keeps all weights


class DraftModel:
    """A model that is built and traced; `load` reads it.

    Args:
        model: hub id, folder or file.
        shares: it is a copy of the target and uses the target's own tensors where both are alike: small weights that
            are always resident (norms, biases), and a table that is only looked up.
        weights_wanted: they will be read; else the headers are enough.
        encode: gives the checkpoint to describe in place of the one that is there; `load` is then not for it.
        options: of `from_pretrained`.

    Attributes:
        model: meant to be called once it is loaded.
        nbytes: of the weights that it keeps for itself.
    """

    @ordinarily
    def __init__(
        self,
        model: str,
        shares: bool = False,
        progress: Progress | None = None,
        weights_wanted: bool = True,
        encode: Encode | None = None,
        **options: Any,
    ) -> None:
        self.described: Described = describe_model(model, dict(options), progress, weights_wanted, encode)
        self.model: PreTrainedModel = self.described.model
        weights = self.described.weights.schedule.weights
        buffers = {name for name, _ in self.model.named_buffers()}
        self.shared = frozenset(
            name
            for name, w in weights.items()
            if shares and name not in buffers and ((w.always and not w.packed) or w.gathered)
        )
        self.nbytes = resident_size(w for name, w in weights.items() if name not in self.shared)
        self.scratch_bytes = self.described.weights.schedule.scratch_bytes

    @property
    def plan(self) -> Plan:
        """All weights are resident, but for the shared ones."""
        plan = make_plan(self.described.weights.schedule, Budget(EVERYTHING))
        return dataclasses.replace(plan, resident=plan.resident - self.shared)

    def cache_bytes(self, tokens: int) -> int:
        """Of a cache of its own after `tokens`."""
        return self.described.trace.cache(tokens)

    def activation_bytes(self, tokens: int) -> int:
        """Of a pass over `tokens`."""
        return self.described.trace.activations(tokens)

    @ordinarily
    def load(self, target: Engine, progress: Progress | None = None) -> None:
        """Read the weights; those in few bits are multiplied with rounded activations from then on, which is quicker.

        Args:
            target: the engine of the target; the draft model uses its device, and shared weights are bound there.

        Raises:
            CheckpointError: a weight to be shared has another shape in the target.
        """
        described = self.described
        with contextlib.closing(Readers(fingerprints=described.checkpoint.fingerprints)) as readers:
            engine = Engine(self.model, described.weights, self.plan, target.device, readers)
            engine.start(self.model, progress)
            described.checkpoint.verify_unchanged()
        for name in self.shared:
            if name not in target.schedule or target.schedule[name].shape != engine.schedule[name].shape:
                raise CheckpointError(
                    f"{described.checkpoint.root} is no copy of this model: its {name} differs; delete that folder, "
                    f"it is made again"
                )

        def share() -> None:
            for name in self.shared:
                engine.sites.bind(name, target.sites.bound(name))

        share()
        target.followers.append(share)
        for parameter in self.model.parameters():
            if isinstance(parameter, PackedTensor):
                parameter.quick = True
