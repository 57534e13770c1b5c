"""Between a call of `generate` and a loop of our own.

`generate(custom_generate=callable)` is public. It prepares inputs, cache, logits processors and stopping criteria and
hands them over; but it loses the streamer and the tokenizer of stop strings on the way, so both are taken out before.
Within a pass the loop needs what transformers' own loop calls: see `lamina.hf.internals`. Where a call fails over a
setting that came with the model, `blame` names it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, generation
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from lamina.errors import LaminaError, RequestError
from lamina.fallbacks import cause
from lamina.hf import internals
from lamina.hf.internals import silent
from lamina.tensors.ids import vocabulary_rows

FOLLOWED = (
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.MinLengthLogitsProcessor,
    generation.MinNewTokensLengthLogitsProcessor,
    generation.MinPLogitsWarper,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.RepetitionPenaltyLogitsProcessor,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)  # processors that remember nothing from call to call: a draft may ask them about tokens that never come


_MODES = ("do_sample", "num_beams")  # without these other settings are not looked at
_PROMPT_TOKENS = 8  # of a trial: enough for what looks back at pairs and triples


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
    why = _unfit(config)
    if why is None and model.generation_config.stop_strings is not None and request.get("stop_strings") is None:
        return "the model's own generation config has stop strings"
    return why


def _unfit(config: GenerationConfig) -> str | None:
    """Why a loop of our own cannot do what these settings ask for; None where it can."""
    try:
        mode = config.get_generation_mode(None)
    except NotImplementedError:
        return "the model makes its text in a way of its own"
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return "beams and other searches decode as they always did"
    if config.num_return_sequences > 1:
        return "several sequences at once share a pass already"
    if config.output_attentions or config.output_hidden_states:
        return "attentions and hidden states are asked for, which are given token by token"
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        return f"a {config.cache_implementation} cache cannot forget what was not accepted"
    if not config.use_cache:
        return "there is no cache"
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


# -- settings that came with a model: named where `generate` fails over one of them


def blame(model: Any, came: Mapping[str, Any], error: Exception, kwargs: Mapping[str, Any], began: bool) -> None:
    """Say of a `generate` that failed which setting that came with the model it fails over, if it does.

    Args:
        model: as it is when `generate` was called on it.
        came: the settings that came with it.
        error: what `generate` raised.
        kwargs: the arguments of the call.
        began: a pass was made before it failed.

    Raises:
        RequestError: it fails over a setting of the model that was not changed, and that the call does not name.
    """
    if isinstance(error, LaminaError | MemoryError) or kwargs.get("generation_config") is not None:
        return
    usual = GenerationConfig().to_dict()
    mine = _came_and_stayed(model, came, usual, kwargs)
    said = [] if began else [name for name in mine if re.search(rf"\b{name}\b", str(error))]
    given = {name: value for name, value in kwargs.items() if name in usual}
    name = next(iter(said or _found_by_trial(model, mine, given)), None)
    if name is not None:
        raise RequestError(
            f"generate fails over {name} = {str(mine[name])[:60]}, which the generation config of the model in "
            f"{model.config.name_or_path} says ({cause(error)}): pass another {name}= to generate"
        ) from error


def _found_by_trial(model: Any, mine: Iterable[str], given: Mapping[str, Any]) -> Iterator[str]:
    """The settings without each of which a call does not fail that fails with all."""
    if _fails(model, given, ()):
        yield from (name for name in mine if name not in _MODES and not _fails(model, given, [name]))


def _came_and_stayed(
    model: Any, came: Mapping[str, Any], usual: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The unusual settings that came with a model, were not changed since, and are not named by the call."""
    now = model.generation_config.to_dict()
    unusual = {name: value for name, value in came.items() if value is not None and value != usual.get(name)}
    return {name: value for name, value in unusual.items() if name not in kwargs and repr(now.get(name)) == repr(value)}


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
    except Exception:  # of any class: the question is only whether it fails
        return True
    return False
