"""The small JSON files of a model: read once with care, bounded, and named where transformers fails over them."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_peft_available

from lamina.checkpoint.mistaken import ADAPTER_CONFIG, why_unreadable
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.fallbacks import cause
from lamina.sizes import format_size

LARGEST = 64 << 20  # bytes of a JSON file: the largest configs known have some hundred kB
MOST_SUSPECTS = 3
MOST_COUNTED = 10_000  # beams, answers to a prompt, tokens of a draft
HUGE = 1 << 31

MOST_ITEMS = 100_000  # of layers, experts, heads, labels, ..., where no checkpoint has more tensors
MODULES = 1_000  # that a model may have with any checkpoint
MODULES_PER_TENSOR = 16
UNSTORED = 256_000_000  # bytes of tensors that no file holds, with any checkpoint: tables of positions, masks

_COUNTERS = re.compile(
    r"(^|_)(num|n)_([a-z0-9]+_)*(layer|label|expert|head|block|group|stage|level|codebook)s?($|_)"
    r"|(layers|labels|experts|heads|blocks|depth|depths)$|^n_?(layer|head)s?$"
)

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
_INSIDE: Mapping[str, type] = {**dict.fromkeys(_IDS.split(), int), "stop_strings": str}  # of lists
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
    """Any error of transformers or torch in this block is raised as one of the config, with the fields that look wrong.

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
        if name not in _KINDS or value is None:
            continue
        kind, wanted = _KINDS[name]
        whole = isinstance(value, float) and value.is_integer() and kind is int
        if not (whole or isinstance(value, kind)) or not _all_are(value, _INSIDE.get(name)):
            raise CheckpointError(f"{where}: {name} must be {wanted}, got {short(value)}: fetch the file again")
        if name in _COUNTS and not 0 < value <= MOST_COUNTED:
            raise CheckpointError(f"{where}: {name} must be from 1 to {MOST_COUNTED}, got {short(value)}")


def _all_are(value: Any, kind: type | None) -> bool:
    """Whether the members of a list are of one kind, where it must be: true and false are no whole numbers."""
    return kind is None or not isinstance(value, list) or all(type(each) is kind for each in value)


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
    except Exception:  # of any class: the question is only whether it fails
        return False
    return True


def _suspects(fields: Mapping[str, Any], usual: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in fields.items():
        normal = usual.get(name)
        if isinstance(value, dict) and isinstance(normal, dict):
            yield from _suspects(value, normal, f"{before}{name}.")
            continue
        if name not in ("dtype", "torch_dtype", "model_type") and _looks_wrong(value, normal):
            yield f"{before}{name} = {short(value)}"


def _looks_wrong(value: Any, usual: Any) -> bool:
    """Whether a value is of another kind than is usual, or a number beyond all reason."""
    if not _is_number(value):
        return usual is not None and value is not None and type(value) is not type(usual)
    if not -HUGE < value < HUGE:  # NaN is not, either
        return True
    return value <= 0 < usual if _is_number(usual) else usual is not None


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


# -- what a config may ask for: no more modules and no more memory than its checkpoint can be the reason of. A number in
# it is a loop or an allocation in a model's constructor. What is bounded is the same for every family: numbers that
# count something, against the number of tensors that are there; modules while they are made; and memory for what no
# file holds, which transformers would make up.


def check_counts(
    fields: Mapping[str, Any], tensors: int, where: str, wrong: type[LaminaError] = CheckpointError
) -> None:
    """Refuse a number of layers, experts, labels, ... that no checkpoint of so many tensors has.

    Args:
        fields: of a config, as JSON has them.
        tensors: in the headers of the checkpoint.
        where: how an error names the fields' place.
        wrong: the error to raise.
    """
    most = max(MOST_ITEMS, tensors)
    for name, value in _walk(fields):
        if isinstance(value, int) and value > most and _COUNTERS.search(name.rpartition(".")[2]):
            raise wrong(f"{where} says {name} = {short(value)}, the checkpoint has {tensors} tensors: that cannot be")


@contextmanager
def as_many_as(tensors: int, where: str) -> Iterator[None]:
    """Within this block this thread makes no more modules than a checkpoint of so many tensors can need.

    Raises:
        CheckpointError: it would.
    """
    most, made, mine = MODULES + MODULES_PER_TENSOR * tensors, 0, threading.get_ident()

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal made
        if threading.get_ident() != mine:
            return
        made += 1
        if made > most:
            raise CheckpointError(
                f"{where} asks for more than {most} modules, the checkpoint has {tensors} tensors: too many layers "
                "or experts, or belongs to another model"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class Unstored(TorchFunctionMode):
    """Within this block little memory is taken for what no file holds.

    transformers gives memory to buffers that follow from the config, and to parameters that it does not find, before
    anybody can say that they are missing. Such a parameter stays without memory where it is large.

    Args:
        stored_bytes: of the checkpoint.
        where: how an error names the config.

    Attributes:
        left_out: bytes of parameters that have no memory.
    """

    def __init__(self, stored_bytes: int, where: str) -> None:
        super().__init__()
        self.room, self.where, self.left_out = UNSTORED + stored_bytes, where, 0
        self._parameters = min(self.room, UNSTORED)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty_like or not args[0].is_meta or _on_meta(kwargs.get("device", "meta")):
            return func(*args, **kwargs)
        nbytes = args[0].numel() * args[0].element_size()
        if isinstance(args[0], nn.Parameter):
            self._parameters -= nbytes
            if self._parameters < 0:
                self.left_out += nbytes
                return func(*args, **{**kwargs, "device": "meta"})
            return func(*args, **kwargs)
        self.room -= nbytes
        if self.room < 0:
            raise CheckpointError(
                f"{self.where} asks for a buffer of shape {tuple(args[0].shape)} ({format_size(nbytes)}) that no file "
                "holds: a size in it is wrong, such as the longest context"
            )
        return func(*args, **kwargs)


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _walk(fields: Mapping[str, Any], before: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and depth:
            yield from _walk(value, f"{before}{name}.", depth - 1)
        else:
            yield f"{before}{name}", value


def refuse_adapter(folder: str, model: str) -> str | None:
    """What is to be said of the adapter in a model's folder; None where there is none.

    Args:
        folder: of the small files.
        model: as it was asked for.

    Raises:
        UnsupportedError: plain transformers would apply it.
    """
    if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return None
    if not is_peft_available():
        return f"the adapter in {folder} is not applied: transformers does it where peft is installed, and it is not"
    raise UnsupportedError(
        f"{model} holds an adapter beside the model ({ADAPTER_CONFIG}), which transformers applies and Lamina does not "
        "by itself: move it and its weights to a folder of their own, then model.load_adapter(that folder) applies it"
    )
