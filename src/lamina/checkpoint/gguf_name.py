"""Which GGUF file is meant: `org/model:file.gguf`, `folder:Q4_K_M`, or the only one there is.

Names only, nothing is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from lamina.caller import named_model
from lamina.checkpoint.strict import quote
from lamina.errors import LaminaError, RequestError, UnsupportedError

ENDING = ".gguf"
USUAL = "Q4_K_M"
"""What is proposed first, as llama.cpp and ollama take it first."""

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_TAG = re.compile(r"[\w.-]+")
_SHOWN = 6
_DEEPEST = 2  # folders in a local folder that are looked into


def split_name(model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A model and which GGUF file of it, as in `org/model:file.gguf` and `folder:Q4_K_M`; None where none is named.

    What exists is a path, whatever colons it has; so is what begins like a drive of Windows, or like an address.
    """
    name = os.fspath(model)
    head, colon, choice = name.rpartition(":")
    if not colon or len(head) < 2 or os.path.lexists(os.path.expanduser(name)):
        return name, None
    if choice.lower().endswith(ENDING) and not choice.startswith(("/", "\\")):
        return head, choice
    return (head, choice) if _TAG.fullmatch(choice) else (name, None)


def part_names(name: str) -> list[str]:
    """The names of all parts of a split model, by that of one; the name alone where it is none of a part."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The models among file names, of a split one the first part that is there; projectors of images are left out."""
    models: dict[str, str] = {}
    for name in sorted(names):
        base = os.path.basename(name)
        if base.lower().endswith(ENDING) and not base.startswith((".", "mmproj")):
            models.setdefault(part_names(name)[0], name)
    return sorted(models.values())


def choose_gguf(names: Iterable[str], choice: str, where: str) -> str:
    """The file that a choice means: a name, its last part, or a tag such as `Q4_K_M` that one file has in its name.

    Args:
        names: of files, by their paths in the folder or repository.
        choice: what was asked for.
        where: that folder or repository, as a user names it.

    Raises:
        RequestError: none fits, or several do.
    """
    names = sorted(names)
    if choice in names:
        return choice
    models = gguf_models(names)
    if choice.lower().endswith(ENDING):
        found = [name for name in names if os.path.basename(name) == choice]
        found = gguf_models(found) or found
    else:
        tag = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(choice)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [name for name in models if tag.search(name)]
        found = [name for name in found if tag.search(os.path.basename(name))] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{where} has {len(found)} GGUF models for {quote(choice)}: {naming(found, where)}")
    what = (
        f"has no file {quote(choice)}" if choice.lower().endswith(ENDING) else f"has no GGUF file for {quote(choice)}"
    )
    raise RequestError(f"{where} {what}{f': {naming(models, where)}' if models else ', nor any GGUF'}")


def gguf_alone(names: Iterable[str], where: str) -> LaminaError:
    """The error for a place that has GGUF models only, and nobody said which."""
    models = gguf_models(names)
    if not models:
        return UnsupportedError(f"{where} holds a projector of images in GGUF and no model: give the model's own file")
    count = "one GGUF model" if len(models) == 1 else f"{len(models)} GGUF models"
    return UnsupportedError(f"{where} holds {count} and no other weights: {naming(models, where)}")


def naming(models: list[str], where: str) -> str:
    """How to name one of several, in words that can be copied."""
    first = next((name for name in models if USUAL.lower() in name.lower()), models[0])
    others = [name for name in models if name != first]
    more = f" and {len(others) - _SHOWN} others" if len(others) > _SHOWN else ""
    return f"name one, as in {named_model(where, f'{where}:{first}')}" + (
        f"; it also has {', '.join(others[:_SHOWN])}{more}" if others else ""
    )


def local_names(root: str) -> list[str]:
    """The GGUF files of a local folder and of those in it, by their paths with slashes."""
    names = []
    for top, folders, found in os.walk(root):
        inside = os.path.relpath(top, root)
        depth = 0 if inside == "." else inside.count(os.sep) + 1
        folders[:] = [each for each in sorted(folders) if not each.startswith(".") and depth < _DEEPEST]
        paths = [os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/") for name in found]
        names += [path for path in paths if path.lower().endswith(ENDING)]
    return sorted(names)
