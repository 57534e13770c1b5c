"""The command `lamina`: which commands there are, and the one place where errors become a line and an exit code.

Exit codes: 0 done; 2 the request is wrong; 1 it failed; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import lamina
from lamina.cli import commands, interrupt, output, split
from lamina.cli.chat import chat
from lamina.cli.options import expand
from lamina.errors import LaminaError, RequestError, one_line

app = typer.Typer(
    name="lamina",
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would double the time to show it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (commands.run, chat, commands.plan, commands.bench, split.split, split.verify):
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
    """Run language models that are bigger than memory: the weights stay on disk and stream through a small window.

    \b
    Examples:
      lamina run ./model "The capital of France is" --memory 4GB
      lamina chat org/model --memory 4GB
      lamina plan ./model --memory 4GB      (what would live where, before anything is read)
      lamina run --help                     (each command has examples)
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")  # other libraries' advice to programmers
    output.ready()
    sys.exit(_run(arguments, debug=debug))


def _run(arguments: list[str], *, debug: bool) -> int:
    """Run the command, and say in one line what kept it from its end; its exit code."""
    try:
        code = app(arguments or ["--help"], prog_name="lamina", standalone_mode=False)
        output.finish()
    except output.OutputClosed:
        output.give_up()
        return 0
    except SystemExit as stopped:  # typer's way of meeting a closed stdout while it shows help
        if not isinstance(stopped.__context__, BrokenPipeError):
            raise
        output.give_up()
        return 0
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code = _failed(error)
        _flush()
    finally:
        interrupt.leave_at_once()
    if code == interrupt.CODE or interrupt.pressed:  # whatever other libraries made of it
        return _say("interrupted", interrupt.CODE)
    return code or 0


def _failed(error: BaseException) -> int:
    if interrupt.pressed or isinstance(error, KeyboardInterrupt):
        return interrupt.CODE
    if isinstance(error, LaminaError):
        return _say(one_line(error), 2 if isinstance(error, RequestError) else 1)
    if not isinstance(error, typer.TyperException):
        return _say(f"{type(error).__name__}: {one_line(error)} (run it again with --debug for the traceback)", 1)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "lamina"
    message = " ".join(error.format_message().split()).rstrip(".")
    return _say(f"{message[:1].lower()}{message[1:]} (see '{path} --help')", 2)


def _say(line: str, code: int) -> int:
    output.tell(f"lamina: {line}")
    return code


def _flush() -> None:
    """What was written before a failure is written out; that this fails as well is no second line."""
    try:
        output.finish()
    except (output.OutputClosed, LaminaError):
        output.give_up()
