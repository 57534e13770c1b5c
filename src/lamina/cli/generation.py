"""One answer: from a prompt to text that appears as it is made. What `run` and `chat` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from lamina.cli import attachments, library, report
from lamina.cli.attachments import Attachment, Message
from lamina.cli.options import Sampling, check_prompt_ids, parse_prompt_ids, vocabulary_of
from lamina.cli.text import TextStream, TokenStream
from lamina.errors import RequestError


def read_prompt(model: str, prompt: str | None, prompt_ids: str | None, attached: bool = False) -> str | list[int]:
    """The prompt as text or token ids: from the arguments, or from standard input where none or `-` is given.

    Args:
        attached: something goes with it, and it may be empty.

    Raises:
        RequestError: there is no prompt, more than one, or one that cannot be read.
    """
    if prompt_ids is not None:
        if prompt is not None:
            raise RequestError("a prompt and --prompt-ids were given: give one of them")
        ids = parse_prompt_ids(prompt_ids)
        check_prompt_ids(ids, vocabulary_of(model))
        return ids
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            if attached:
                return ""
            raise RequestError("no prompt: write one after the model, pipe one in, or give --prompt-ids")
        prompt = text_of(getattr(sys.stdin, "buffer", sys.stdin).read(), "the prompt on standard input")
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt and not attached:
        raise RequestError("the prompt is empty")
    return text_of(prompt, "the prompt")


def text_of(read: str | bytes, what: str) -> str:
    """What was read or typed, which must be UTF-8; in a `str`, Python hides bytes that are not.

    Raises:
        RequestError: it says where the first wrong byte is.
    """
    raw = read.encode(errors="surrogateescape") if isinstance(read, str) else read
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8 text: byte {error.start + 1} of {len(raw)} is 0x{raw[error.start]:02x}"
        ) from error


def encode(model: Any, prompt: str | list[int]) -> dict[str, Any]:
    """The inputs of `generate` for a prompt taken as it is."""
    if isinstance(prompt, list):
        check_prompt_ids(prompt, library.vocabulary(model))
        return library.token_inputs(model, prompt)
    return dict(model.tokenizer(prompt, return_tensors="pt").to(model.device))


def encode_attached(model: Any, name: str, prompt: str, attached: list[Attachment], *, chat: bool) -> dict[str, Any]:
    """The inputs of `generate` for a prompt with pictures or sounds: with the chat template, if there is one.

    Args:
        chat: it has to be with the chat template.

    Raises:
        RequestError: the model does not take them, or there is no chat template.
    """
    if chat or has_template(attachments.processor_of(model, name, attached)):
        content = [*attached, prompt] if prompt else attached
        return encode_chat(model, name, [{"role": "user", "content": content}])
    return attachments.encode_bare(model, name, prompt, attached)


def encode_chat(model: Any, name: str, messages: list[Message]) -> dict[str, Any]:
    """The inputs of `generate` for a conversation, written as the model's chat template says.

    Raises:
        RequestError: the model has no chat template, or it refuses the conversation; or it takes no such attachment.
    """
    attached = attachments.attached_to(messages)
    writer = attachments.processor_of(model, name, attached) if attached else _writer(model)
    if not has_template(writer):
        raise RequestError(f"{name} has no chat template: it completes text, use 'lamina run' without --chat")
    if attached or _reads_parts(model, writer):
        messages = attachments.in_parts(messages, writer)
    with attachments.refusals(f"the processor of {name}") if attached else nullcontext():
        try:
            inputs = writer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:
            # Templates say no with their own raise_exception; jinja2's tree is no dependency of ours.
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise RequestError(f"the chat template of {name} refuses this conversation: {error}") from error
        return attachments.on_device(model, inputs) if attached else dict(inputs.to(model.device))


def has_template(writer: Any) -> bool:
    """Whether a tokenizer or processor has a chat template."""
    return bool(getattr(writer, "chat_template", None))


def _sees_or_hears(model: Any) -> bool:
    return bool((attachments.IMAGE.inputs | attachments.AUDIO.inputs) & library.inputs_taken(model))


def _writer(model: Any) -> Any:
    """What writes a conversation of text alone: the tokenizer, or the processor where only that has a template."""
    return model.processor if _sees_or_hears(model) and not has_template(model.tokenizer) else model.tokenizer


def _reads_parts(model: Any, writer: Any) -> bool:
    """Whether the template of a model that sees or hears tells texts from pictures: some take no bare text."""
    return _sees_or_hears(model) and "type" in str(writer.chat_template)


class Notes:
    """Tells what the user should know about a model, each thing once.

    Args:
        note: writes a line beside the text; None: it is not written.
    """

    def __init__(self, note: Callable[[str], None] | None) -> None:
        self._note = note
        self._told: set[str] = set()

    def loaded(self, model: Any) -> None:
        """What it is about to do."""
        if self._note is None:
            return
        stats = library.as_dict(model.lamina.stats)
        self._note(report.intention(library.as_dict(model.lamina.plan)))
        if drafting := report.drafting(stats):
            self._note(drafting)
        self.answered(stats, off=False)

    def answered(self, stats: Mapping[str, Any], off: bool = True) -> None:
        """Second ways that were taken meanwhile; and why there was no draft, if one was meant to be."""
        lines = [f"lamina: {reason}" for reason in stats.get("fallbacks") or ()]
        if off and (nothing := report.nothing_drafted(stats)):
            lines.append(nothing)
        for line in lines:
            if self._note is not None and line not in self._told:
                self._told.add(line)
                self._note(line)


def generate(
    model: Any,
    inputs: dict[str, Any],
    sampling: Sampling,
    max_new_tokens: int,
    write: Callable[[str], None],
    *,
    tokenizer: Any | None,
    count: Callable[[int], None],
    stopped: Callable[[], bool] | None = None,
) -> tuple[list[int], str | None]:
    """Generate from one prompt, handing each piece of text to `write` and each number of new tokens to `count`.

    Args:
        tokenizer: turns the tokens into text; None writes their numbers instead.
        stopped: asked after every token; True ends the answer there.

    Returns:
        The new tokens, and their text, which is None without a tokenizer.
    """
    if sampling.seed is not None:
        library.set_seed(sampling.seed)
    tokens: list[int] = []
    pieces: list[str] = []
    before = [] if library.reads_first(model) or "input_ids" not in inputs else inputs["input_ids"][0].tolist()
    text = None if tokenizer is None else TextStream(tokenizer, before)

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            write(piece)

    def receive(ids: list[int]) -> None:
        separator = "," if tokens else ""
        tokens.extend(ids)
        count(len(ids))
        show(text.push(ids) if text else separator + ",".join(map(str, ids)))

    model.generate(
        **inputs,
        **sampling.as_kwargs(),
        max_new_tokens=max_new_tokens,
        streamer=TokenStream(receive),
        stopping_criteria=[lambda ids, scores, **_: stopped()] if stopped else None,
    )
    if text is None:
        return tokens, None
    show(text.finish())
    return tokens, "".join(pieces)
