"""The seam for mixture-of-experts layers.

transformers sends the expert call of every family that it has ported to fused experts through one
registry, chosen by the config. While a model is traced a stand-in takes the call,
because the real one asks for the routed ids, which a meta tensor does not have.

When the model runs, nothing stands in: the module's own eager code asks for one expert at a time, and what it
is called with says beforehand which ones that will be (`routed_tokens`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from lamina.hf.internals import ALL_EXPERTS_FUNCTIONS, experts_implementation, set_experts_implementation

ONE_BY_ONE = "lamina_trace"  # stands for "eager", which picks one expert after the other
AT_ONCE = "lamina_trace_whole"  # stands for those that multiply with all experts at once
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def picks(args: Iterable[Any]) -> torch.Tensor | None:
    """The routed ids among the arguments of an experts module: its integers, of shape (tokens, experts a token)."""
    return next((a for a in args if isinstance(a, torch.Tensor) and _counts(a) and a.dim() >= 2), None)


def routes(args: Iterable[Any]) -> bool:
    """Whether these are the arguments of an experts module: routed ids, and as many weights for them."""
    values = list(args)
    ids = picks(values)
    if ids is None:
        return False
    return any(isinstance(a, torch.Tensor) and a.is_floating_point() and a.shape == ids.shape for a in values)


def routed_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], experts: int) -> tuple[dict[int, int], int] | None:
    """Which experts a call is routed to, from what the module is called with.

    Ids that are no expert of this module (masked tokens, experts that compute nothing) are left out.

    Args:
        args, kwargs: of the module's forward: the routed ids, or a list with the number of tokens of each expert.
        experts: how many the module has.

    Returns:
        Tokens by expert, experts ascending, and the tokens of the call; None where the arguments do not tell.
    """
    values = (*args, *kwargs.values())
    ids = picks(values)
    if ids is not None:
        flat = ids.detach().reshape(-1)
        flat = flat[(flat >= 0) & (flat < experts)]
        counts = torch.bincount(flat, minlength=experts).tolist()
        tokens = ids.numel() // ids.shape[-1] if ids.shape[-1] else 0
    else:
        lists = [v for v in values if isinstance(v, list) and len(v) == experts and _integers(v)]
        if not lists:
            return None
        counts = lists[0]
        tokens = sum(counts)
    return {expert: count for expert, count in enumerate(counts) if count}, tokens


def experts_by_config(config: Any) -> frozenset[int]:
    """How many experts a layer has, by the names that transformers' configs use."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in COUNTS)
    return frozenset(count for count in found if isinstance(count, int) and count > 1)


@contextmanager
def standing_in(model: PreTrainedModel) -> Iterator[None]:
    """Within this block experts are not computed, only touched."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, experts_implementation(c)) for c in configs.values()]
    for name, stand_in in ((ONE_BY_ONE, _touch_one), (AT_ONCE, _touch_all)):
        if name not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(name, stand_in)
    for config, chosen in before:
        if chosen is not None:
            set_experts_implementation(config, ONE_BY_ONE if chosen == "eager" else AT_ONCE)
    try:
        yield
    finally:
        for config, chosen in before:
            if chosen is not None:
                set_experts_implementation(config, chosen)


def _touch_one(self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Pick an expert of every weight and give back the input's shape."""
    for weight in self.parameters(recurse=False):
        weight[0]
    return _as_large(self, hidden_states, picks((*args, *kwargs.values())))


def _touch_all(self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Touch every weight as a whole and give back the input's shape."""
    for weight in self.parameters(recurse=False):
        weight.detach()
    return _as_large(self, hidden_states, picks((*args, *kwargs.values())))


def _as_large(module: torch.nn.Module, hidden_states: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """The result's shape, after as much was alive as where every token goes to one and the same expert.

    Eager code then holds the tokens' states, what the widest matrix makes of them and as much again of its gate
    and product, beside the mask of who goes where.
    """
    shapes = [weight.shape for weight in module.parameters(recurse=False)]  # asking for more would be a touch
    widths = [size for shape in shapes if len(shape) == 3 for size in shape[1:]]
    experts = max((shape[0] for shape in shapes if len(shape) == 3), default=0)
    tokens = hidden_states.numel() // max(hidden_states.shape[-1], 1)
    states = hidden_states.new_empty(tokens, hidden_states.shape[-1] + 2 * max(widths, default=0))
    mask = ids.new_empty(*ids.shape, experts + 1) if ids is not None else None
    out = torch.zeros_like(hidden_states)
    del states, mask
    return out


def _counts(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool


def _integers(values: list[Any]) -> bool:
    return all(isinstance(value, int) for value in values)
