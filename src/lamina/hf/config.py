"""config.json and generation_config.json: read once with care, and named where transformers fails over them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lamina.checkpoint.mistaken import why_unreadable
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.fallbacks import cause

LARGEST = 64 << 20  # bytes of a JSON file: the largest configs known have some hundred kB
MOST_SUSPECTS = 3
MOST_COUNTED = 10_000  # beams, answers to a prompt, tokens of a draft
HUGE = 1 << 31

_WHOLE = """max_length max_new_tokens min_length min_new_tokens num_beams max_cache_len top_k no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences num_assistant_tokens prompt_lookup_num_tokens
    max_matching_ngram_size assistant_early_exit target_lookbehind assistant_lookbehind pad_token_id bos_token_id
    prefill_chunk_size num_beam_groups"""
_NUMBERS = """max_time temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty guidance_scale assistant_confidence_threshold diversity_penalty
    assistant_ensemble_weight"""
_FLAGS = """do_sample use_cache renormalize_logits remove_invalid_values token_healing output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate is_assistant disable_compile"""
_IDS = """eos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens"""
_WORDS = "cache_implementation num_assistant_tokens_schedule speculation_type"
_KINDS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(_WHOLE.split(), (int, "a whole number")),
    **dict.fromkeys(_NUMBERS.split(), (int | float, "a number")),
    **dict.fromkeys(_FLAGS.split(), (bool | int, "true or false")),
    **dict.fromkeys(_IDS.split(), (int | list, "a token id or a list of them")),
    **dict.fromkeys(_WORDS.split(), (str, "a word")),
    "early_stopping": (bool | int | str, "true, false or a word"),
    "stop_strings": (str | list, "text or a list of texts"),
    "cache_config": (dict, "an object"),
    "bad_words_ids": (list, "a list of lists of token ids"),
    "exponential_decay_length_penalty": (list, "a list of two numbers"),
    "sequence_bias": (list | dict, "a list of pairs"),
    "watermarking_config": (dict, "an object"),
    "compile_config": (dict, "an object"),
}
_COUNTS = ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens", "max_matching_ngram_size")


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file as transformers reads it: NaN and Infinity are numbers, of a key twice the last counts.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    advice = "fetch it again, it belongs to the model"
    try:
        if os.path.getsize(path) > LARGEST:
            raise CheckpointError(f"{path} has {os.path.getsize(path)} bytes, too many for a config: {advice}")
        with open(path, "rb") as file:
            found = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:  # not UTF-8 is one, too
        raise CheckpointError(why_unreadable(path) or f"{path} is not JSON ({error}): {advice}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, not an object: {advice}")
    return found


@contextmanager
def blaming(where: str, fields: Mapping[str, Any], step: str) -> Iterator[None]:
    """Whatever transformers or torch fail with in this block is said of a config, with the fields that look wrong.

    Raises:
        CheckpointError: in place of any other exception, from it; running out of memory and Ctrl-C are themselves.
        UnsupportedError: a package is missing.
    """
    try:
        yield
    except (LaminaError, MemoryError):
        raise
    except ImportError as error:
        raise UnsupportedError(f"{where} needs a package that is not installed: {cause(error)}") from error
    except Exception as error:  # a config of wrong values fails in any line of anybody's code
        raise CheckpointError(f"{where}: {step} fails, {_said(error)}{_hint(fields)}") from error


def check_generation(fields: Mapping[str, Any], where: str) -> None:
    """Refuse fields of a generation config that are of a wrong kind.

    Raises:
        CheckpointError: the first of them.
    """
    for name, value in fields.items():
        kind, wanted = _KINDS.get(name, (object, ""))
        whole = isinstance(value, float) and value.is_integer() and kind is int
        if value is not None and not whole and not isinstance(value, kind):
            raise CheckpointError(f"{where}: {name} must be {wanted}, got {short(value)}: fetch the file again")
        if name in _IDS.split() and isinstance(value, list) and not all(type(each) is int for each in value):
            raise CheckpointError(f"{where}: {name} must be {wanted}, got {short(value)}: fetch the file again")
        if name == "stop_strings" and isinstance(value, list) and not all(isinstance(each, str) for each in value):
            raise CheckpointError(f"{where}: {name} must be {wanted}, got {short(value)}: fetch the file again")
        if name in _COUNTS and value is not None and not 0 < value <= MOST_COUNTED:
            raise CheckpointError(f"{where}: {name} must be from 1 to {MOST_COUNTED}, got {short(value)}")


def _said(error: Exception) -> str:
    """What an exception says: where it is one over a field, that one's own words."""
    if error.__cause__ is not None and "field" in str(error):
        return " ".join(str(error).split())[:300]
    return cause(error)


def _hint(fields: Mapping[str, Any]) -> str:
    """The fields without which a config can be made, where with all it cannot; else those that look wrong."""
    if not _makes(fields):
        found = [name for name in fields if _makes({key: fields[key] for key in fields if key != name})]
        if found:
            named = ", ".join(f"{name} = {short(fields[name])}" for name in found[:MOST_SUSPECTS])
            return f"; wrong is {named}"
    try:
        usual = AutoConfig.for_model(str(fields.get("model_type"))).to_dict()
    except Exception:  # no such family, or one without defaults
        usual = {}
    found = list(_suspects(fields, usual))[:MOST_SUSPECTS]
    return f"; wrong is perhaps {', '.join(found)}" if found else ""


def _makes(fields: Mapping[str, Any]) -> bool:
    try:
        AutoConfig.for_model(**fields).to_dict()
    except Exception:  # of whatever class: what is asked is whether there is one
        return False
    return True


def _suspects(fields: Mapping[str, Any], usual: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in fields.items():
        normal = usual.get(name)
        if isinstance(value, dict) and isinstance(normal, dict):
            yield from _suspects(value, normal, f"{before}{name}.")
            continue
        number, numbers = _is_number(value), _is_number(normal)
        odd = normal is not None and value is not None and type(value) is not type(normal) and not (number and numbers)
        if number:
            odd = odd or not -HUGE < value < HUGE  # NaN is not, either
            odd = odd or (numbers and normal is not None and normal > 0 and value <= 0)
        if odd and name not in ("dtype", "torch_dtype", "model_type"):
            yield f"{before}{name} = {short(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value as an error shows it: one line of some 60 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def fields_of(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The fields of a config that was given as an object."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_")} | {
        "model_type": config.model_type
    }
