"""Between the model's experts modules and the stream of experts.

Hooks tell the stream where the tokens of a call go; stand-ins in place of the weights give the module's own code
one expert after the other; hooks on the routers ask, a layer too early, which experts are likely next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.hf.experts import picks, routed_tokens
from lamina.plan.expert_slots import Experts
from lamina.plan.layout import Placed
from lamina.plan.schedule import Weight
from lamina.stream.experts import ExpertStream
from lamina.stream.observe import LAMINA, timed
from lamina.tensors.disk import DiskTensor
from lamina.tensors.row_blocks import Blocks

PREFETCH_TOKENS = 16  # of a pass, up to which experts are prefetched: many tokens need nearly all of them


class ExpertHooks:
    """Serves the experts modules of one model from one stream.

    Args:
        stream: gives experts.
        finish: gives the tensor of a part whose stored bytes are in memory.
    """

    def __init__(self, stream: ExpertStream, finish: Callable[[Placed, torch.Tensor], torch.Tensor]) -> None:
        self.stream, self._finish = stream, finish
        self.likely: tuple[str, list[int]] | None = None  # experts of the module after the one that is called

    def attach(self, model: nn.Module, experts: Sequence[Experts]) -> list[Any]:
        """Hooks on the experts modules; their handles."""
        handles: list[Any] = []
        for each in experts:
            module = model.get_submodule(each.module)
            handles.append(module.register_forward_pre_hook(self._entering(each), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(each.module), always_call=True))
        return handles

    def prefetch(
        self, model: nn.Module, experts: Sequence[Experts], routers: Mapping[str, str], streamed: Collection[str]
    ) -> list[Any]:
        """Hooks on the routers, where the next one is all in memory; their handles.

        Args:
            routers: by experts module, the module that says where tokens go.
            streamed: names of the weights that are not resident.
        """
        handles: list[Any] = []
        for each, following in itertools.pairwise(experts):
            router, next_router = routers.get(each.module), routers.get(following.module)
            if router is None or next_router is None or any(name.startswith(f"{next_router}.") for name in streamed):
                continue
            asked = _Prefetch(self, model.get_submodule(next_router), following.module)
            handles.append(model.get_submodule(router).register_forward_hook(asked, with_kwargs=True))
        return handles

    def stand_in(self, module: str, weight: Weight, disk: DiskTensor) -> Blocks:
        """What stands in `module` in place of a weight that holds its experts."""
        stand_in = Blocks(disk)
        stand_in.experts, stand_in.expert = weight.experts, self._one(module, weight.name)
        if len(weight.shape) == 3 and weight.rows == weight.experts:
            stand_in.batched = self._all(module, weight)
        return stand_in

    def end_pass(self) -> None:
        """Nothing of a pass is left, however it ended."""
        self.likely = None
        self.stream.leave()

    def _entering(self, experts: Experts) -> Callable[..., None]:
        complete = min(weight.experts for weight in experts.weights)  # those beyond compute nothing

        @timed(LAMINA, f"hook {experts.module}")
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = routed_tokens(args, kwargs, complete)
            if found is not None:
                self.stream.route(experts.module, *found)
                if self.likely is not None:
                    self.stream.prefetch(*self.likely)
            self.likely = None

        return enter

    def _leaving(self, module: str) -> Callable[..., None]:
        @timed(LAMINA, f"hook {module}")
        def leave(*_: object) -> None:
            self.stream.leave()

        return leave

    def _one(self, module: str, weight: str) -> Callable[[int], torch.Tensor]:
        def expert(index: int) -> torch.Tensor:
            found = self.stream.acquire(module, index)
            if found.tensors is None:
                found.tensors = {p.part.weight: self._finish(p, found.memory) for p in found.layout.placed}
            tensor: torch.Tensor = found.tensors[weight]
            return tensor

        return expert

    def _all(self, module: str, weight: Weight) -> Callable[[torch.Tensor], torch.Tensor]:
        expert = self._one(module, weight.name)

        def batched(x: torch.Tensor) -> torch.Tensor:
            """`bmm(x, weight)`, where x holds a token's states for the experts it goes to and zeros for the others."""
            sent = (torch.linalg.vector_norm(x, ord=float("inf"), dim=-1) != 0).sum(-1).tolist()  # NaN is not zero
            tokens = {index: count for index, count in enumerate(sent) if count}
            if not self.stream.routed(module):
                self.stream.route(module, tokens, x.shape[1])
            out = x.new_zeros(x.shape[0], x.shape[1], weight.shape[2])
            for index in tokens:
                out[index] = torch.bmm(x[index : index + 1], expert(index))[0]
            return out

        return batched


class _Prefetch:
    """Asks a router where the tokens would go, with the states that the router of the layer before was given.

    The states change little from layer to layer: of the experts of a token 64-83% are named rightly (docs/log.md).
    Only the order of reading depends on the answer.
    """

    def __init__(self, hooks: ExpertHooks, router: nn.Module, experts: str) -> None:
        self.hooks, self.router, self.experts, self.able = hooks, router, experts, True

    @timed(LAMINA, "hook of a router")
    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = picks(output)
        if not self.able or ids is None or ids.shape[0] > PREFETCH_TOKENS or not self.hooks.stream.prefetches:
            return
        try:
            likely = picks(self.router.forward(*args, **kwargs))
        except (RuntimeError, TypeError, ValueError):  # it takes something else than its neighbour does
            self.able = False
            return
        if likely is not None:
            ranked = likely.t().flatten().tolist()  # everyone's first choice before anyone's second
            self.hooks.likely = self.experts, list(dict.fromkeys(ranked))
