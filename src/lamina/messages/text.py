"""Tokens as they come, turned into text as early as it is certain.

transformers' own `TextStreamer` holds text back to the next space. Where a token takes seconds, every piece is shown
as soon as it is final; only an unfinished character waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Tokens of the prompt decoded along with the first new ones: whether a piece begins with a space depends on what
# stands before it.
_LEAD = 6
UNFINISHED = "\ufffd"  # what bytes decode to that are no character, or not yet


class TextStream:
    """Decodes a growing list of tokens, in time that does not grow with it."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt_ids[-_LEAD:]
        self._start = 0  # where decoding begins
        self._shown = len(self._ids)  # tokens before this one are already text

    def push(self, ids: list[int]) -> str:
        """The text that `ids` make certain; empty while a character is unfinished."""
        self._ids += ids
        known, text = self._decode()
        if len(text) <= len(known) or text.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """What is left at the end; of a character whose last bytes never came there is nothing to show."""
        known, text = self._decode()
        self._start = self._shown = len(self._ids)
        return text[len(known) :].rstrip(UNFINISHED)

    def _decode(self) -> tuple[str, str]:
        known = self._ids[self._start : self._shown]
        whole = self._ids[self._start :]
        return self._text(known), self._text(whole)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenStream:
    """A transformers streamer: hands on new tokens, and skips the prompt, which `generate` sends first."""

    def __init__(self, receive: Callable[[list[int]], None]) -> None:
        self._receive = receive
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Called by `generate` with a tensor: the prompt once, then the new tokens of each pass."""
        if self._prompt_seen:
            self._receive([int(token) for token in value.flatten().tolist()])
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` when it is done."""
