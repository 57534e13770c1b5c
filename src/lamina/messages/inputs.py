"""What a model is given for a text with pictures and sound, or for a conversation: its processor and chat template."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lamina.errors import RequestError, one_line
from lamina.messages.attachments import AUDIO, IMAGE, Attachment, Kind, Message, attached_to, package


def encode_chat(model: Any, name: str, messages: list[Message]) -> dict[str, Any]:
    """The inputs of `generate` for a conversation, written as the model's chat template says.

    Raises:
        RequestError: the model has no chat template, or it refuses the conversation; or it takes no such attachment.
    """
    attached = attached_to(messages)
    more_than_text = bool(kinds_taken(model))
    if attached:
        writer = processor_of(model, name, attached)
    else:  # text alone: the tokenizer writes it, or the processor where only that has a template
        writer = model.processor if more_than_text and not has_template(model.tokenizer) else model.tokenizer
    if not has_template(writer):
        raise RequestError(
            f"{name} has no chat template: it completes a bare text, 'lamina run' does that, and holds no conversation"
        )
    if attached or (more_than_text and "type" in str(writer.chat_template)):  # some take no bare text then
        messages = in_parts(messages, writer)
    with refusals(name):
        inputs = writer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return on_device(model, inputs)


def has_template(writer: Any) -> bool:
    """Whether a tokenizer or processor has a chat template."""
    return bool(getattr(writer, "chat_template", None))


def kinds_taken(model: Any) -> list[Kind]:
    """What a model has inputs for beside text."""
    # Its `input_modalities` do not tell: a class for text alone inherits those of its family.
    return [kind for kind in (IMAGE, AUDIO) if kind.inputs & inputs_taken(model)]


def check_taken(model: Any, attached: Sequence[Attachment]) -> None:
    """Refuse what the model has no inputs for.

    Raises:
        RequestError: it names the model's class.
    """
    taken = kinds_taken(model)
    if refused := next((each.kind for each in attached if each.kind not in taken), None):
        raise RequestError(f"{type(model).__name__} takes no {refused.word}s")


def in_parts(messages: Sequence[Message], processor: Any) -> list[Message]:
    """A conversation as the chat templates of models with several kinds of inputs read it."""

    def part(each: Attachment | str) -> dict[str, Any]:
        if isinstance(each, str):
            return {"type": "text", "text": each}
        return {"type": each.kind.name, each.kind.name: _value(each, processor)}

    def parts(content: str | Sequence[Attachment | str]) -> list[dict[str, Any]]:
        return [part(each) for each in ([content] if isinstance(content, str) else content)]

    return [{**message, "content": parts(message["content"])} for message in messages]


def encode_bare(model: Any, name: str, prompt: str, attached: Sequence[Attachment]) -> dict[str, Any]:
    """The inputs of `generate` for a prompt with pictures or sounds, without a chat template.

    A token for each of them stands before the prompt, as far as the prompt has none itself.

    Raises:
        RequestError: the model does not take them.
    """
    processor = processor_of(model, name, attached)
    arguments: dict[str, Any] = {"return_tensors": "pt"}
    text = prompt
    for kind in dict.fromkeys(each.kind for each in attached):
        values = arguments[kind.argument] = [_value(each, processor) for each in attached if each.kind is kind]
        if isinstance(token := getattr(processor, f"{kind.name}_token", None), str):
            text = token * max(len(values) - text.count(token), 0) + text
    if AUDIO.argument in arguments:
        arguments["sampling_rate"] = _rate(processor)
    with refusals(name):
        if hasattr(processor, "get_prompt_ids"):  # of one that only listens the prompt is what was said before
            before = {"prompt_ids": processor.get_prompt_ids(prompt, return_tensors="pt")} if prompt else {}
            return on_device(model, {**processor(**arguments), **before})
        return on_device(model, processor(**arguments, **({"text": text} if text else {})))


def processor_of(model: Any, name: str, attached: Sequence[Attachment]) -> Any:
    """The processor of a model that takes what is attached.

    Raises:
        RequestError: it takes none, or no processor is with it.
    """
    check_taken(model, attached)
    processor = model.processor
    if hasattr(processor, "convert_tokens_to_ids") and not hasattr(processor, "tokenizer"):
        kinds = " and ".join(dict.fromkeys(f"{each.kind.word}s" for each in attached))
        raise RequestError(f"{name} has a tokenizer and no processor of {kinds} (preprocessor_config.json)")
    return processor


def _value(attached: Attachment, processor: Any) -> Any:
    """What a processor is given; of a sound, at as many samples a second as it takes."""
    wanted = _rate(processor)
    if attached.kind is not AUDIO or attached.rate == wanted:
        return attached.value
    return package("soxr", "soxr", "audio").resample(attached.value, attached.rate, wanted)


def _rate(processor: Any) -> int:
    for each in (getattr(processor, "feature_extractor", None), getattr(processor, "audio_processor", None), processor):
        if isinstance(found := getattr(each, "sampling_rate", None), int):
            return found
    return 16_000


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """What the processor or the template of a model raises over its input, as a refusal in one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError) as error:
        raise RequestError(f"the processor of {name} refuses this: {one_line(error)}") from error
    except Exception as error:
        # Templates say no with their own raise_exception; jinja2's tree is no dependency of ours.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RequestError(f"the chat template of {name} refuses this conversation: {error}") from error


def on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs beside the model, numbers that are no ids in the model's own type."""
    # A BatchFeature has this as its `to`; some processors give a BatchEncoding, whose `to` takes no type.
    dtype = getattr(model, "dtype", None)

    def moved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [moved(each) for each in value]
        if not hasattr(value, "is_floating_point"):
            return value
        return value.to(model.device, dtype) if value.is_floating_point() else value.to(model.device)

    return {key: moved(value) for key, value in inputs.items()}


def inputs_taken(model: Any) -> frozenset[str]:
    """The names of what a model's forward pass takes."""
    return frozenset(inspect.signature(type(model).forward).parameters) if hasattr(model, "forward") else frozenset()


def reads_first(model: Any) -> bool:
    """Whether an encoder reads the prompt, so that the answer does not continue it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def vocabulary(model: Any) -> int | None:
    """How many tokens a loaded model has; None where it does not say."""
    return _stated(model, "vocab_size")


def most_tokens(model: Any) -> int | None:
    """The longest text that a loaded model was made for; None where it does not say."""
    return _stated(model, "max_position_embeddings")


def _stated(model: Any, name: str) -> int | None:
    """A number above zero of the config of a model's text."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = getattr(text, name, None)
    return found if isinstance(found, int) and found > 0 else None
