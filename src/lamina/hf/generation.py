"""Between a call of `generate` and a loop of our own.

`generate(custom_generate=callable)` is public. It prepares inputs, cache, logits processors and stopping criteria and
hands them over; but it loses the streamer and the tokenizer of stop strings on the way, so both are taken out before.
Within a pass the loop needs what transformers' own loop calls: see `lamina.hf.internals`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationMode,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lamina.hf import internals

FOLLOWED = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)  # processors that remember nothing from call to call: a draft may ask them about tokens that never come


def why_plain(model: PreTrainedModel, request: Mapping[str, Any]) -> str | None:
    """Why a call of `generate` decodes as transformers does it, or None where speculation may.

    Args:
        request: the keyword arguments of the call.
    """
    for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "synced_gpus", "use_mtp"):
        if request.get(name):
            return f"the call has {name} of its own"
    given = {key: request[key] for key in _settings(request) if key != "generation_config"}
    config = internals.generation_config_of(model, request.get("generation_config"), given)
    if config.get_generation_mode(None) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return "beams and other searches decode as they always did"
    if config.num_return_sequences > 1:
        return "several sequences at once share a pass already"
    if config.output_attentions or config.output_hidden_states:
        return "attentions and hidden states are asked for, which are given token by token"
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        return f"a {config.cache_implementation} cache cannot forget what was not accepted"
    if not config.use_cache:
        return "there is no cache"
    if model.generation_config.stop_strings is not None and request.get("stop_strings") is None:
        return "the model's own generation config has stop strings"
    return None


def _settings(request: Mapping[str, Any]) -> list[str]:
    fields = GenerationConfig().to_dict()
    return [key for key in request if key in fields or key == "generation_config"]


def taken_out(request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The call without what `custom_generate` would lose, and the streamer.

    The streamer stays in the call as well, for `generate` shows it the prompt. Stop strings become a criterion.
    """
    request = dict(request)
    config = request.get("generation_config")
    strings = request.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    tokenizer = request.pop("tokenizer", None)
    if strings is not None:
        if tokenizer is None:
            raise ValueError("stop strings need a tokenizer: pass tokenizer=model.tokenizer to generate")
        own = StopStringCriteria(tokenizer, strings)
        request["stopping_criteria"] = StoppingCriteriaList([*(request.get("stopping_criteria") or ()), own])
        if config is not None:
            request["generation_config"] = copy.deepcopy(config)
            request["generation_config"].stop_strings = None
    return request, request.get("streamer")


def verify(model: Any, ids: torch.Tensor, new: int, kwargs: Mapping[str, Any]) -> Any:
    """One pass over the last `new` tokens of `ids`; the cache holds those before.

    Args:
        ids: shape (1, tokens).
        kwargs: of the pass, as they are for the first of the new tokens.
    """
    inputs = internals.inputs_of(model, ids, new, kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = new
    return model(**inputs, return_dict=True)


def followed(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that a draft follows too."""
    return LogitsProcessorList([each for each in processors if type(each) in FOLLOWED])
