"""The command `lamina`: which commands there are, and the one place where errors become a line and an exit code.

Exit codes: 0 done; 2 the request is wrong; 1 it failed; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import lamina
from lamina.cli import commands, store
from lamina.cli.chat import chat
from lamina.cli.options import expand
from lamina.cli.report import one_line
from lamina.errors import LaminaError, RequestError

app = typer.Typer(
    name="lamina",
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would double the time to show it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (commands.run, chat, commands.plan, commands.bench, store.split, store.verify):
    app.command()(expand(_command))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lamina {lamina.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run language models that are bigger than memory: the weights stay on disk and stream through a small window."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")  # other libraries' advice to programmers
    code = _run(arguments, debug=debug)
    _flush()
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    if not arguments:
        arguments = ["--help"]
    try:
        code = app(arguments, prog_name="lamina", standalone_mode=False)
    except (LaminaError, typer.TyperException) as error:
        if debug:
            traceback.print_exc()
        return _failed(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _say(f"{type(error).__name__}: {one_line(error)} (run it again with --debug for the traceback)", 1)
    if code == 130:
        return _say("interrupted", 130)
    return code or 0


def _failed(error: LaminaError | typer.TyperException) -> int:
    if isinstance(error, LaminaError):
        return _say(one_line(error), 2 if isinstance(error, RequestError) else 1)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "lamina"
    message = " ".join(error.format_message().split()).rstrip(".")
    return _say(f"{message[:1].lower()}{message[1:]} (see '{path} --help')", 2)


def _say(line: str, code: int) -> int:
    typer.echo(f"lamina: {line}", err=True)
    return code


def _flush() -> None:
    """Flush now: a reader that has gone away (`lamina run ... | head`) is then no error at the exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
