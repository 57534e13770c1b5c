"""Text appears as soon as it is certain, and the pieces are the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.cli_double import Tokenizer
from lamina.messages.text import TextStream, TokenStream


class Words:
    """A SentencePiece-like tokenizer: a word's space is shown only where a word stands before it."""

    words = ("The", "capital", "is", "Paris", "<eos>")

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(self.words[token] for token in ids if token != 4)


def test_a_piece_keeps_the_space_that_parts_it_from_the_prompt() -> None:
    stream = TextStream(Words(), [0, 1, 2])
    assert [stream.push([3]), stream.push([2]), stream.push([4]), stream.finish()] == [" Paris", " is", "", ""]


def test_an_unfinished_character_waits_for_its_last_byte() -> None:
    stream = TextStream(Tokenizer(), list(b"a"))
    pieces = [stream.push([byte]) for byte in "é€b".encode()]
    assert pieces == ["", "é", "", "", "€", "b"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_never_finishes_is_left_out(cut: int) -> None:
    stream = TextStream(Tokenizer(), list(b"a"))
    assert stream.push(list("x😀".encode()[:-cut])) == ""
    assert stream.finish() == "x"
    assert stream.finish() == ""


@given(st.text(max_size=20), st.integers(min_value=1, max_value=5), st.integers(min_value=0, max_value=80))
def test_an_answer_that_is_cut_anywhere_shows_whole_characters(answer: str, step: int, cut: int) -> None:
    stream = TextStream(Tokenizer(), list(b"a"))
    ids = list(answer.encode()[:cut])
    pieces = [stream.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    shown = "".join([*pieces, stream.finish()])
    assert shown == bytes(ids).decode(errors="ignore").rstrip("\ufffd")


@given(
    st.text(max_size=40),
    st.text(max_size=40).filter(lambda text: not text.endswith("\ufffd")),
    st.integers(min_value=1, max_value=5),
)
def test_the_pieces_are_the_whole_text(prompt: str, answer: str, step: int) -> None:
    stream = TextStream(Tokenizer(), list(prompt.encode()))
    ids = list(answer.encode())
    pieces = [stream.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join([*pieces, stream.finish()]) == answer


def test_the_prompt_that_generate_sends_first_is_skipped() -> None:
    got: list[list[int]] = []
    stream = TokenStream(got.append)
    for value in ([[1, 2, 3]], [4], [5, 6]):
        stream.put(np.array(value))
    stream.end()
    assert got == [[4], [5, 6]]
