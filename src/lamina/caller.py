"""Options are named as the user writes them: `memory='4GB'` in Python, `--memory 4GB` on the command line.

A message that names an option does it through `option`, and asks `offers` before it advises one. The command line says
for how long a command of its is at work, and which options that one has; a call from Python says nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command of the command line at work.

    Attributes:
        name: as in `lamina NAME`.
        given: the options that it has, each with what was given for it or its default.
    """

    name: str
    given: Mapping[str, Any] = field(default_factory=dict)


FLAGS = {"local_files_only": "offline"}  # what the command line calls otherwise

_ANYTHING = object()  # an option without a value
_command: Command | None = None  # of this process, whichever thread meets the error


@contextmanager
def speaking(command: Command) -> Iterator[None]:
    """While the block runs, messages are for the user of this command."""
    global _command
    before, _command = _command, command
    try:
        yield
    finally:
        _command = before


def option(name: str, value: Any = _ANYTHING) -> str:
    """An option by its keyword, with a value or without, as the caller would write it."""
    if _command is not None:
        name = FLAGS.get(name, name)
    if _command is None or name not in _command.given:
        written = f"{name}=" if value is _ANYTHING else f"{name}={value!r}"
        return written if _command is None else f"{written} in Python"
    flag = "--" + name.replace("_", "-")
    return flag if value is _ANYTHING or value is True else f"{flag} {shlex.quote(str(value))}"


def offers(name: str) -> bool:
    """Whether the caller can give this option: in Python always, on the command line where the command has it."""
    return _command is None or name in _command.given


def named_model(model: str, exactly: str) -> str:
    """How the caller names a model, or a draft, more exactly than by `model`."""
    if _command is None:
        return repr(exactly)
    if _command.given.get("draft") == model:
        return f"{option('draft')} {shlex.quote(exactly)}"
    return f"`{shlex.join(['lamina', _command.name, exactly])}`"


def another_place() -> str:
    """What to do about a folder that a store cannot be written to."""
    if _command is None:
        return "choose another place with layer_shards_saving_path=, or to= of split"
    if "to" in _command.given:
        return "choose another place with --to"
    given = {key: _command.given.get(key) for key in ("model", "compression")}
    words = ["lamina", "split", str(given["model"] or "MODEL")]
    if given["compression"]:
        words += ["--compression", str(given["compression"])]
    return f"choose another place with `{shlex.join(words)} --to DIR`, and give DIR as the model"


def token_ids_instead() -> str:
    """What to do where there is no tokenizer."""
    if _command is None:
        return "pass token ids instead"
    if "prompt_ids" in _command.given:
        return "give token ids with --prompt-ids 1,2,3"
    return (
        f"`{shlex.join(['lamina', 'run', str(_command.given.get('model') or 'MODEL')])} --prompt-ids 1,2,3` takes ids"
    )
