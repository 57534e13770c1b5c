"""`split` and `verify`: a store is written, a store is read back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from lamina.checkpoint.manifest import check_compression
from lamina.cli import library, output, report
from lamina.cli.live import StatusLine, Terminal, stdio
from lamina.cli.options import Json, ModelArgument, SourceOptions, Verbosity, check_folder
from lamina.errors import CheckpointError
from lamina.sizes import format_size


def split(
    model: ModelArgument,
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="The new folder. Default: beside the model, DIR-CODEC.")
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(metavar="CODEC", help="8bit, 4bit or lossless. Default: the same numbers, laid out anew."),
    ] = None,
    delete_original: Annotated[
        bool, typer.Option("--delete-original", help="Delete the model's weight files once the new ones are verified.")
    ] = False,
    json: Json = False,
    *,
    source: SourceOptions,
    verbosity: Verbosity,
) -> None:
    """Write a model again, unit by unit, smaller if wanted.

    A split that was stopped continues when the same command is run again. The folder is then a model as any other.

    \b
    Examples:
      lamina split ./model --compression 4bit
      lamina split org/model --to /mnt/fast/model-8bit --compression 8bit
      lamina split ./model --compression lossless --delete-original
      lamina run ./model-4bit "The capital of France is" --memory 4GB
    """
    if compression is not None:
        check_compression(compression)
    check_folder("to", to)
    terminal, progress = stdio(json=True, quiet=verbosity.quiet), StatusLine(1)
    waiting = _Waiting(terminal, progress)
    with contextlib.redirect_stdout(sys.stderr), terminal.showing(progress.describe), _saying_what_is_kept(terminal):
        made = library.store_library(source).split(
            model,
            to=to,
            compression=compression,
            delete_original=delete_original,
            progress=waiting.report,
            **source.as_kwargs(),
        )
    result = library.as_dict(made)
    for path, why in result["kept"].items():
        terminal.note(f"kept: {path} {why}")
    output.put(report.as_json(result) if json else result["folder"])
    if not verbosity.quiet:
        output.tell(report.split_summary(result))


@contextlib.contextmanager
def _saying_what_is_kept(terminal: Terminal) -> Iterator[None]:
    """Where the user stops a split, say how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.note("what is finished is kept: run the same command again, and it continues from there")
        raise


def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `lamina split` wrote.")],
    json: Json = False,
    *,
    verbosity: Verbosity,
) -> None:
    """Compare every byte of a split model with what was written.

    Names each file that is not what it was; the exit code is then 1.

    \b
    Examples:
      lamina verify ./model-4bit
      lamina verify ./model-4bit --json
    """
    progress = StatusLine(1)
    terminal = stdio(json=True, quiet=verbosity.quiet)
    with contextlib.redirect_stdout(sys.stderr), terminal.showing(progress.describe):
        checked = library.store_library(SourceOptions()).verify(folder, progress=progress.report)
    result = library.as_dict(checked)
    if json:
        output.put(report.as_json(result))
    for fault in [] if json else result["faults"]:
        output.put(f"{fault['file']} {fault['what']}")
    if count := len(result["faults"]):
        raise CheckpointError(
            f"{count} of {result['files']} files in {result['folder']} {'is' if count == 1 else 'are'} damaged: "
            "remove what is named, then run the same `lamina split` again"
        )
    if result.get("small_files", 0) is None:
        terminal.note("config and tokenizer were not compared: an older lamina wrote the store and did not list them")
    if not verbosity.quiet:
        size = format_size(result["bytes"])
        output.tell(f"{result['files']} files, {size} ({result['compression']}): all as written")


class _Waiting:
    """Hands progress on, and says in a line of its own that another process is waited for."""

    def __init__(self, terminal: Terminal, progress: StatusLine) -> None:
        self._terminal, self._progress, self._said = terminal, progress, False

    def report(self, stage: str, done: int, total: int) -> None:
        if stage == "wait" and not self._said:
            self._said = True
            self._terminal.note("another process writes the same folder: waiting for it")
        self._progress.report(stage, done, total)
