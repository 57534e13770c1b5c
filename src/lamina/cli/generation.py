"""One answer: from a prompt to text that appears as it is made. What `run` and `chat` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from lamina.cli import library, report
from lamina.cli.options import Sampling, check_prompt_ids, parse_prompt_ids, vocabulary_of
from lamina.errors import RequestError
from lamina.messages import inputs as encoding
from lamina.messages.attachments import Attachment, content_of
from lamina.messages.text import TextStream, TokenStream


def read_prompt(model: str, prompt: str | None, prompt_ids: str | None, **with_text: Any) -> str | list[int]:
    """The prompt as text or token ids: from the arguments, or from standard input where none or `-` is given.

    Args:
        with_text: what was given for the options that need it as text, by their names; with a picture or a sound it
            may be empty.

    Raises:
        RequestError: there is no prompt, more than one, or one that cannot be read.
    """
    if prompt_ids is not None:
        if prompt is not None:
            raise RequestError("a prompt and --prompt-ids were given: give one of them")
        return _ids(model, prompt_ids, with_text)
    attached = with_text.get("image") or with_text.get("audio")
    if prompt is None or prompt == "-":
        prompt = _piped()
    if prompt is None and not attached:
        raise RequestError("no prompt: write one after the model, pipe one in, or give --prompt-ids")
    if not prompt and not attached:
        raise RequestError("the prompt is empty")
    return text_of(prompt or "", "the prompt")


def _ids(model: str, prompt_ids: str, with_text: Mapping[str, Any]) -> list[int]:
    ids = parse_prompt_ids(prompt_ids)
    check_prompt_ids(ids, vocabulary_of(model))
    if wrong := next((name for name, given in with_text.items() if given), None):
        raise RequestError(f"--{wrong} needs the prompt as text, not as --prompt-ids")
    return ids


def _piped() -> str | None:
    """What stands on standard input, without a newline at its end; None where that is nothing but keys."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    read = text_of(getattr(sys.stdin, "buffer", sys.stdin).read(), "the prompt on standard input")
    return read.removesuffix("\n").removesuffix("\r")


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


def encode(model: Any, name: str, prompt: str | list[int], attached: list[Attachment], *, chat: bool) -> dict[str, Any]:
    """The inputs of `generate` for a prompt: as it is, or as a question.

    Args:
        attached: goes with the prompt, which is a question then wherever there is a chat template.
        chat: it has to be a question.

    Raises:
        RequestError: the model does not take what is attached, or there is no chat template.
    """
    if isinstance(prompt, list):
        check_prompt_ids(prompt, encoding.vocabulary(model))
        return library.token_inputs(model, prompt)
    if chat or (attached and encoding.has_template(encoding.processor_of(model, name, attached))):
        return encoding.encode_chat(model, name, [{"role": "user", "content": content_of(attached, prompt)}])
    if attached:
        return encoding.encode_bare(model, name, prompt, attached)
    return dict(model.tokenizer(prompt, return_tensors="pt").to(model.device))


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
    before = [] if encoding.reads_first(model) or "input_ids" not in inputs else inputs["input_ids"][0].tolist()
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
