"""Settings of generation that came with a model: named where `generate` fails over one of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from lamina.errors import LaminaError, RequestError
from lamina.fallbacks import cause
from lamina.hf.quiet import silent
from lamina.tensors.ids import vocabulary_rows

_MODES = ("do_sample", "num_beams")  # without these other settings are not looked at
_PROMPT_TOKENS = 8  # of a trial: enough for what looks back at pairs and triples


def blame(model: Any, came: Mapping[str, Any], error: Exception, kwargs: Mapping[str, Any], began: bool) -> None:
    """Say of a `generate` that failed which setting that came with the model it fails over, if it does.

    Args:
        model: as it is when `generate` was called on it.
        came: the settings that came with it.
        error: what `generate` raised.
        kwargs: the arguments of the call.
        began: a pass was made before it failed.

    Raises:
        RequestError: it fails over a setting that nobody changed since, and that the call does not name.
    """
    if isinstance(error, LaminaError | MemoryError) or kwargs.get("generation_config") is not None:
        return
    now, usual, text = model.generation_config.to_dict(), GenerationConfig().to_dict(), str(error)
    mine = {
        name: value
        for name, value in came.items()
        if value is not None and value != usual.get(name) and name not in kwargs and repr(now.get(name)) == repr(value)
    }
    named = [name for name in mine if not began and re.search(rf"\b{name}\b", text)]
    given = {name: value for name, value in kwargs.items() if name in usual}
    if not named and _fails(model, given, ()):
        named = [name for name in mine if name not in _MODES and not _fails(model, given, [name])]
    for name in named[:1]:
        raise RequestError(
            f"generate fails over {name} = {str(mine[name])[:60]}, which the generation config of the model in "
            f"{model.config.name_or_path} says ({cause(error)}): pass another {name}= to generate"
        ) from error


def _fails(model: Any, given: Mapping[str, Any], left_out: Iterable[str]) -> bool:
    """Whether a call without a pass fails: its settings are prepared, and choose among scores that are all alike."""
    config = copy.deepcopy(model.generation_config)
    for name in left_out:
        setattr(config, name, getattr(GenerationConfig(), name, None))
    trial = object.__new__(type(model))  # the same modules, and settings of its own
    trial.__dict__.update(vars(model), generation_config=config)
    device = model.device
    ids = torch.zeros(1, _PROMPT_TOKENS, dtype=torch.long, device=device)
    scores = torch.zeros(1, vocabulary_rows(model) or 1, device=device)

    def choose(_: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **unused: Any) -> torch.Tensor:
        logits_processor(input_ids, scores)
        return input_ids

    length = {} if {"max_new_tokens", "max_length"} & given.keys() else {"max_new_tokens": 1}
    given = {name: value for name, value in given.items() if name != "custom_generate"}
    if "max_new_tokens" in given:
        given["max_new_tokens"] = 1  # what is forced at the end is forced now
    try:
        with silent():
            type(model).generate(
                trial, ids, attention_mask=torch.ones_like(ids), custom_generate=choose, **given, **length
            )
    except Exception:  # of whatever class: what is asked is whether there is one
        return True
    return False
