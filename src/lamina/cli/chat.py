"""`lamina chat`: a conversation that lives until it is ended; an answer can be stopped without losing it."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer

from lamina.cli import engine, report
from lamina.cli.generation import Notes, encode_chat, generate
from lamina.cli.live import Terminal, stdio, telling
from lamina.cli.options import ModelArgument, ModelOptions, Sampling, Verbosity
from lamina.cli.progress import Progress
from lamina.cli.report import one_line
from lamina.errors import RequestError

_HELP = """/reset  forget the conversation
/exit   end (or Ctrl-D)
/help   this list
Ctrl-C stops an answer at its next token; a second Ctrl-C at once."""


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="The longest answer.")
    ] = 512,
    *,
    sampling: Sampling,
    options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Talk with a model through its chat template.

    \b
    Examples:
      lamina chat ./model --memory 4GB
      lamina chat org/model --system "Answer in one sentence." --temperature 0.7
    """
    terminal = stdio(json=False, quiet=verbosity.quiet)
    progress = Progress(max_new_tokens)
    with ExitStack() as stack:
        with terminal.showing(progress.describe), telling(terminal, quiet=verbosity.quiet):
            loaded = stack.enter_context(engine.opened(model, options, progress.report))
        progress.watch(loaded)
        talk = Conversation(loaded, model, system, sampling, max_new_tokens)
        talk.check()
        notes = Notes(None if verbosity.quiet else terminal.note)
        notes.loaded(loaded)
        if not verbosity.quiet:
            typer.echo("/help lists the commands, Ctrl-D ends.", err=True)
        while (line := _read_line()) is not None and line not in ("/exit", "/quit"):
            if line == "/reset":
                talk.reset()
            elif line == "/help":
                typer.echo(_HELP, err=True)
            elif line.startswith("/"):
                typer.echo(f"lamina: no command {line.split()[0]}: /help lists them", err=True)
            elif line:
                _answer(talk, line, terminal, progress, notes, quiet=verbosity.quiet)


class Conversation:
    """What has been said so far, and the model that answers it."""

    def __init__(self, model: Any, name: str, system: str | None, sampling: Sampling, max_new_tokens: int) -> None:
        self.model = model
        self.messages: list[dict[str, str]] = []
        self._name = name
        self._system = system
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def check(self) -> None:
        """Raise now what the first question would raise: a missing tokenizer or chat template."""
        encode_chat(self.model, self._name, [*self.messages, {"role": "user", "content": "?"}])

    def ask(
        self, question: str, write: Callable[[str], None], count: Callable[[int], None], stopped: Callable[[], bool]
    ) -> int:
        """Answer `question`, and remember both; an answer that was stopped is remembered as far as it came.

        Returns:
            How many tokens the answer has.

        Raises:
            RequestError: the question cannot be answered, such as one longer than the context; it is forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        inputs = encode_chat(self.model, self._name, asked)
        pieces: list[str] = []
        tokens = 0

        def show(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        def counted(new: int) -> None:
            nonlocal tokens
            tokens += new
            count(new)

        with suppress(KeyboardInterrupt):
            generate(
                self.model,
                inputs,
                self._sampling,
                self._max_new_tokens,
                show,
                tokenizer=self.model.tokenizer,
                count=counted,
                stopped=stopped,
            )
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        return tokens


def _answer(
    talk: Conversation, question: str, terminal: Terminal, progress: Progress, notes: Notes, *, quiet: bool
) -> None:
    progress.begin()
    try:
        with terminal.showing(progress.describe), _interrupt_once(progress) as stopped:
            tokens = talk.ask(question, terminal.write, progress.count, stopped)
    except RequestError as error:
        typer.echo(f"lamina: {one_line(error)}", err=True)
        return
    terminal.write("\n")
    stats = engine.as_dict(talk.model.lamina.stats)
    notes.answered(stats)
    if not quiet:
        typer.echo(report.summary(stats, tokens), err=True)


@contextmanager
def _interrupt_once(progress: Progress) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is a request, which the yielded function reports; the second is a KeyboardInterrupt."""
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        progress.note = "stopping at the next token; Ctrl-C again stops at once"

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
        progress.note = None


def _read_line() -> str | None:
    """What the user says next; None at the end of the input."""
    while True:
        try:
            if sys.stdin.isatty():
                with suppress(ImportError):
                    importlib.import_module("readline")  # editing and history for input()
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            typer.echo(err=True)
            return None
        except KeyboardInterrupt:
            typer.echo("\nlamina: Ctrl-D or /exit ends the chat", err=True)
