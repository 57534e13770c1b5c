"""The seam for mixture-of-experts layers.

transformers sends the expert call of every family that it has ported to fused experts through one
registry, chosen by `config._experts_implementation`. While a model is traced a stand-in takes the call,
because the real one asks for the routed ids, which a meta tensor does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

STAND_IN = "lamina_trace"


def _touch_all(self: torch.nn.Module, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Touch every weight of an experts module and give back its input's shape."""
    for weight in self.parameters(recurse=False):
        weight[0]
    return torch.zeros_like(hidden_states)


@contextmanager
def standing_in(model: PreTrainedModel) -> Iterator[None]:
    """Within this block experts are not computed, only touched."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, getattr(c, "_experts_implementation", None)) for c in configs.values()]
    if STAND_IN not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(STAND_IN, _touch_all)
    for config, chosen in before:
        if chosen is not None:
            config._experts_implementation = STAND_IN
    try:
        yield
    finally:
        for config, chosen in before:
            if chosen is not None:
                config._experts_implementation = chosen
