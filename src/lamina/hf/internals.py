"""What Lamina uses of transformers beyond its documentation: the one file that a new version can move.

Names of arguments, attributes and functions that a minor version may change without a word are written here and nowhere
else; `tests/unit/hf/test_transformers_contract.py` holds each of them against the installed transformers, and the
sources of Lamina against this rule. docs/compatibility.md says how the supported range is moved.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.core_model_loading import rename_source_key
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "CACHE",
    "GGUF_CONFIG_MAPPING",
    "TOKENIZER_MAPPING_NAMES",
    "Conv1D",
    "rename_source_key",
    "sdpa_attention_forward",
    "sdpa_mask",
    "tokenizer_class_from_name",
]

_parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _parameters else "past_key_values"
"""The name that generation has for the key-value cache: `cache` from 5.24 on, `past_key_values` before."""

_CACHES = tuple(dict.fromkeys((CACHE, "cache", "past_key_values", "cache_params")))  # mamba's own until 5.23


@contextmanager
def silent() -> Iterator[None]:
    """transformers without progress bars and load reports: the library prints nothing."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# -- processors


@contextmanager
def without_video() -> Iterator[None]:
    """Processors load without their video part, whose classes need torchvision; asked for a video, they say so."""
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.processing_utils import ProcessorMixin
    from transformers.video_processing_utils import VideoProcessorMixin

    class NoVideo(VideoProcessorMixin):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise ImportError("a video needs torchvision, which is not installed")

    def no_video(folder: str, **kwargs: Any) -> NoVideo:
        fields, _ = NoVideo.get_image_processor_dict(folder, **kwargs)
        return NoVideo(**fields)

    def class_of(processor: Any, name: str, argument: Any) -> Any:
        return NoVideo if isinstance(argument, NoVideo) else check(processor, name, argument)

    check, plain = ProcessorMixin.check_argument_for_proper_class, AutoVideoProcessor.__dict__["from_pretrained"]
    ProcessorMixin.check_argument_for_proper_class = class_of
    AutoVideoProcessor.from_pretrained = no_video
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
        AutoVideoProcessor.from_pretrained = plain


# -- the cache of a call, under any of its names


@cache
def _arguments(forward: Any) -> dict[str, None]:
    return dict.fromkeys(inspect.signature(forward).parameters)


def arguments_of(model: Any) -> Collection[str]:
    """The names that the forward of a model's class takes."""
    kind: Any = type(model)
    return _arguments(kind.forward).keys()


def by_name(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward of a model is given, by name."""
    return {**dict(zip([*arguments_of(model)][1:], args, strict=False)), **kwargs} if args else dict(kwargs)


def cache_argument(model: Any) -> str | None:
    """The name under which a model's forward takes its cache; None where it takes none."""
    taken = arguments_of(model)
    return next((name for name in _CACHES if name in taken), None)


def encoded(states: torch.Tensor) -> ModelOutput:
    """What an encoder gives a decoder: `states` of shape (batch, tokens, hidden)."""
    return BaseModelOutput(last_hidden_state=states)


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, or in what a pass gave; None where there is none."""
    return next((values[name] for name in _CACHES if values.get(name) is not None), None)


def batched_tokens(kwargs: Mapping[str, Any]) -> int:
    """Tokens that a pass of a continuous batch gives; 0 for any other pass."""
    indices = kwargs.get("logits_indices")
    return int(indices.shape[-1]) if isinstance(indices, torch.Tensor) else 0


def refuse_alone(
    manager: Any,
    wrong: Callable[[list[int]], Exception | None],
    too_long: Callable[[int, int], str],
    shortened: Callable[[int, int, int], None],
) -> None:
    """Let a request of a continuous batch that cannot be answered fail alone, and end one that would outgrow the cache.

    transformers ends every request of the batch where one of them is wrong or finds no room.

    Args:
        manager: of the batch, not started.
        wrong: (tokens of a prompt) -> what is wrong with them, if anything is.
        too_long: (tokens of a prompt, tokens that the cache holds) -> what the request's error says.
        shortened: called with (tokens of a prompt, tokens that were asked for, tokens that there is room for).
    """
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens  # 15 ms

    queue, plain = manager.input_queue, manager.input_queue.get_nowait
    found: list[int] = []

    def room() -> int:
        if not found:  # the first request: the cache is there, and empty
            paged = manager.batch_processor.cache
            windowed = paged.read_cache_limit is not None  # no layer keeps more than its window
            found.append(sys.maxsize if windowed else infer_max_single_request_tokens(paged))
        return found[0]

    def get_nowait() -> Any:
        while True:
            state = plain()
            if state is None or manager.batch_processor is None:
                return state
            if (error := wrong(state.initial_tokens)) is not None:
                manager.output_router.fail_and_deliver(state, error)
                continue
            prompt, left = len(state.initial_tokens), room() - len(state.initial_tokens)
            if left > 0:
                if state._new_tokens_limit > left:
                    if state.max_new_tokens is not None:
                        shortened(prompt, state.max_new_tokens, left)
                    state.max_new_tokens = state._new_tokens_limit = left
                return state
            manager.output_router.fail_and_deliver(state, MemoryError(too_long(prompt, room())))

    queue.get_nowait = get_nowait


def keeps_scores(config: Any) -> bool:
    """Whether a model's attention makes the scores of every row and key at once."""
    return "eager" in str(attention_implementation(config))


def managed_already(model: Any) -> bool:
    """Whether a model kept the manager of its continuous batches, which is then used again."""
    return getattr(model, "_cached_continuous_batching_manager", None) is not None


def when_stopped(manager: Any, then: Callable[[], None]) -> None:
    """Call `then` when the cache of a continuous batch is gone."""
    stop = manager.stop

    def stopped(*args: Any, **kwargs: Any) -> None:
        try:
            stop(*args, **kwargs)
        finally:
            if manager.batch_processor is None:
                then()

    manager.stop = stopped


def cached_tokens(cache: Any) -> int:
    """Tokens that a cache holds, of each of its texts; 0 for a state of one size, and for anything else."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    states = list(getattr(cache, "is_linear", ()))
    if states and all(states):
        return 0
    return int(cache.get_seq_length())


def can_crop(cache: Any) -> bool:
    """Whether a cache can forget its last tokens; known once a pass went through it."""
    return bool(getattr(cache, "is_croppable", False))


def record_past(cache: Any) -> None:
    """Have a cache keep from now on what `crop` needs."""
    cache.activate_past_recording()


def crop(cache: Any, tokens: int) -> None:
    """Forget the last `tokens` tokens."""
    cache.crop(-tokens)


def convolves(cache: Any) -> bool:
    """Whether some of a cache's layers keep a state in place of keys and values."""
    return any(getattr(cache, "is_linear", ()))


ONE_TOKEN = frozenset({"blt", "cpmant", "prophetnet"})  # model types: several tokens fail, or count otherwise


def is_stateful(model: Any) -> bool:
    """Whether a model keeps a state that cannot go back."""
    return bool(getattr(model, "_is_stateful", False))


def takes_one_token(model: Any) -> bool:
    """Whether a model with a cache refuses a pass over several tokens."""
    return getattr(model.config, "model_type", None) in ONE_TOKEN


# -- which kernels a config asks for


def experts_implementation(config: Any) -> str | None:
    """The way of computing experts; None where the config knows of none."""
    chosen: str | None = getattr(config, "_experts_implementation", None)
    return chosen


def set_experts_implementation(config: Any, name: str) -> None:
    """Have experts computed in another way, without the checks of the public setter."""
    config._experts_implementation = name


def attention_implementation(config: Any) -> str | None:
    """The way of computing attention; None where the config knows of none."""
    chosen: str | None = getattr(config, "_attn_implementation", None)
    return chosen


def attention_names() -> tuple[str, ...]:
    """The ways of computing attention that transformers knows by name."""
    names = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|")}
    return tuple(sorted({"eager", *names}))


# -- generation


def generation_config_of(model: Any, config: Any, given: Mapping[str, Any]) -> GenerationConfig:
    """The settings that `generate` would come to."""
    prepared: GenerationConfig
    prepared, _ = model._prepare_generation_config(config, **given)
    return prepared


def end_tokens(config: Any) -> frozenset[int]:
    """Tokens that end a text, of the config that `generate` hands to its loop."""
    ends = getattr(config, "_eos_token_tensor", None)
    return frozenset() if ends is None else frozenset(ends.flatten().tolist())


def prefill(model: Any, ids: torch.Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> Any:
    """The first pass, over the prompt, as `_sample` makes it."""
    return model._prefill(ids, config, kwargs, is_first_iteration=True)


def inputs_of(model: Any, ids: torch.Tensor, new: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass over the last `new` tokens of `ids` is called with.

    Args:
        ids: shape (1, tokens).
        kwargs: of the pass, as they are for the first of the new tokens.
    """
    grown = dict(kwargs)
    if new > 1:
        try:
            grown = advance(model, ModelOutput(), grown, new - 1)
        except AttributeError:  # idefics asks the outputs for what it has among its arguments already
            grown = advance(model, ModelOutput(), dict(kwargs), new - 1, GenerationMixin)
    inputs: dict[str, Any] = model.prepare_inputs_for_generation(ids, next_sequence_length=new, **grown)
    return inputs


def advance(
    model: Any, outputs: Any, kwargs: dict[str, Any], tokens: int, kind: type[Any] | None = None
) -> dict[str, Any]:
    """The keyword arguments of the next pass, `tokens` tokens further on, as the model's class has it or another."""
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    advanced: dict[str, Any] = (kind or type(model))._update_model_kwargs_for_generation(
        model, outputs, kwargs, is_encoder_decoder=both, num_new_tokens=tokens
    )
    return advanced


def sample(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' own loop, one token a pass."""
    return type(model)._sample(model, *args, **kwargs)


def generated(ids: torch.Tensor, scores: Any, logits: Any, cache: Any) -> GenerateDecoderOnlyOutput:
    """What `generate` gives where `return_dict_in_generate` is asked for."""
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits, **{CACHE: cache})


def generation_config_in(folder: str, **hub: Any) -> GenerationConfig:
    """The generation config that a `config.json` has in itself, as older checkpoints have it.

    Raises:
        OSError: there is no such file.
    """
    found: GenerationConfig = GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True, **hub
    )
    return found


# -- saving


def has_adapters(model: Any) -> bool:
    """Whether adapters were loaded into a model by its own `load_adapter`: then only they are saved."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def tied_names(model: Any) -> set[str]:
    """Patterns of names that stand for another weight."""
    from transformers.modeling_utils import _get_tied_weight_keys

    return set(_get_tied_weight_keys(model))


def as_published(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the names and the cuts that the model's checkpoints are published with."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(model, state)
    return reverted


# -- GGUF


def gguf_config_architectures() -> Container[Any]:
    """GGUF architectures whose config transformers reads with a reader of its own."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    architectures: Container[Any] = GGUF_CONFIG_ARCHS
    return architectures


def gguf_mapping(architecture: Any, config: Any) -> tuple[list[Any], list[Any]] | None:
    """The renamings and converters of a GGUF architecture; None where transformers has a processor for it instead."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported

    if not is_gguf_arch_supported(architecture):
        return None
    mapping = get_gguf_conversion_mapping(architecture, config)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    return renamings, [each for each in mapping if isinstance(each, WeightConverter)]


def gguf_processor(architecture: Any) -> Callable[..., Any]:
    """The class that says what llama.cpp did to the tensors of an architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor: Callable[..., Any] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return processor


def gguf_names(names: Any, processor: Any, family: str | None) -> dict[str, str]:
    """Parameter names by the names of GGUF tensors."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    mapped: dict[str, str] = get_gguf_hf_weights_map(names, processor, family)
    return mapped
