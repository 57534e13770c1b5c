"""JSON from strangers: one object, no key twice, nothing that Python reads and the format does not allow."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from lamina.errors import CheckpointError, UnsupportedError

NOT_THE_FILE: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or download the model again",
    ),
    (b"<!DOCTYPE", "is a web page, not the file itself: download it again"),
    (b"<!doctype", "is a web page, not the file itself: download it again"),
    (b"<html", "is a web page, not the file itself: download it again"),
)
"""How files begin that are often in the place of others, and what is said of them."""

NOT_JSON: tuple[tuple[bytes, str], ...] = (
    (b"\xef\xbb\xbf", "begins with a byte order mark, which JSON does not allow: save it as UTF-8 without BOM"),
    (b"\xff\xfe", "is not UTF-8 but UTF-16: save it as UTF-8 without BOM"),
    (b"\xfe\xff", "is not UTF-8 but UTF-16: save it as UTF-8 without BOM"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
)
"""The same of text. What is no text may well begin so."""

_OTHER_WEIGHTS = (
    (b"GGUF", "is a GGUF file under another name: give it the ending .gguf"),
    (
        b"PK\x03\x04",
        "is a zip archive: if torch.save wrote it, give it the ending .bin; if it holds the model's files, unpack it",
    ),
)


def quote(name: str) -> str:
    """A name from a file, quoted on one line and cut where it is absurdly long."""
    return repr(name if len(name) <= 200 else f"{name[:200]}...")


def refuse_other_content(start: bytes, what: str) -> None:
    """Raises what fits when a file begins like something that people often have in its place."""
    for magic, message in NOT_THE_FILE:
        if start.startswith(magic):
            raise CheckpointError(f"{what} {message}")
    for magic, message in _OTHER_WEIGHTS:
        if start.startswith(magic):
            raise UnsupportedError(f"{what} {message}")


def parse_object(raw: bytes, what: str, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in `raw`.

    Args:
        raw: UTF-8 text.
        what: how an error names it, such as `"the header of model.safetensors"`.
        error: the class to raise.

    Raises:
        CheckpointError: of class `error`; not UTF-8, not JSON, not an object, a key twice, too deep.
    """

    def reject_constant(constant: str) -> NoReturn:
        raise error(f"{what} holds {constant}, which JSON does not allow: the file is damaged, fetch it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise error(f"{what} names {quote(twice)} twice: the file is damaged, fetch it again")
        return found

    for magic, message in (*NOT_THE_FILE, *NOT_JSON):
        if raw.startswith(magic):
            raise error(f"{what} {message}")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_int=_number, parse_constant=reject_constant)
    except UnicodeDecodeError as exc:
        raise error(f"{what} is not UTF-8 (byte {exc.start}): the file is damaged, fetch it again") from None
    except RecursionError:
        raise error(f"{what} is nested too deeply: this is not a checkpoint, fetch it again") from None
    except ValueError as exc:
        raise error(f"{what} is not JSON ({exc}): the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise error(f"{what} is a JSON {type(value).__name__}, not an object: the file is damaged, fetch it again")
    return value


def _number(text: str) -> float:
    # Minus zero is no whole number to safetensors either.
    return -0.0 if text == "-0" else int(text)
