"""JSON from strangers: one object, no key twice, nothing that Python reads and the format does not allow."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from lamina.errors import CheckpointError, UnsupportedError

_NOT_WEIGHTS: tuple[tuple[bytes, type[Exception], str], ...] = (
    (
        b"version https://git-lfs",
        CheckpointError,
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or download the model again",
    ),
    (b"GGUF", UnsupportedError, "is a GGUF file under another name: GGUF cannot be streamed yet, use the safetensors"),
    (b"PK\x03\x04", UnsupportedError, "is a PyTorch pickle under another name: convert it to safetensors first"),
    (b"<!DOCTYPE", CheckpointError, "is a web page, not the file itself: download it again"),
    (b"<html", CheckpointError, "is a web page, not the file itself: download it again"),
)


def quote(name: str) -> str:
    """A name from a file, quoted on one line and cut where it is absurdly long."""
    return repr(name if len(name) <= 200 else f"{name[:200]}...")


def refuse_other_content(start: bytes, what: str) -> None:
    """Raises what fits when a file begins like something that people often have in its place."""
    for magic, error, message in _NOT_WEIGHTS:
        if start[: len(magic)] == magic:
            raise error(f"{what} {message}")


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
