"""`lamina chat`: a conversation that lives until it is ended; an answer can be stopped without losing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer

from lamina.caller import option
from lamina.cli import interrupt, library, output, report
from lamina.cli.generation import Notes, generate, text_of
from lamina.cli.lines import BLOCK, Messages, leaves
from lamina.cli.live import StatusLine, Terminal, stdio
from lamina.cli.options import MOST_TOKENS, MaxNewTokens, ModelArgument, ModelOptions, Sampling, Verbosity, check_tokens
from lamina.errors import BudgetError, RequestError, one_line
from lamina.messages.attachments import Attachment, Message, check_number, content_of, open_audio, open_image
from lamina.messages.inputs import check_taken, encode_chat, most_tokens

_HELP = f"""/reset  forget the conversation
/bye    end (also /exit, /quit, exit, quit, or Ctrl-D)
/image PATH  attach a picture to the next message, as often as there are pictures; /audio PATH a sound
/help   this list
{BLOCK}     begins a message of several lines, which the next {BLOCK} ends; what is pasted is one message
Ctrl-C stops an answer at its next token, a second one at once; it takes back what is typed, and else ends the chat."""

SHARE_FOR_ANSWER = 4  # of the context a quarter is kept for the answer, or less where that is all it may have

ATTACH: dict[str, Callable[[str], Attachment]] = {"/image": open_image, "/audio": open_audio}
"""The commands of a chat that attach a file to the next message."""


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    *,
    sampling: Sampling,
    options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Talk with a model through its chat template.

    A message is a line, what is pasted at once, or what stands between two lines of three double quotes. When the
    conversation outgrows the context, its oldest turns are dropped.

    \b
    Examples:
      lamina chat ./model --memory 4GB
      lamina chat org/model --system "Answer in one sentence." --temperature 0.7
      lamina chat ./model --memory 4GB --context 8192

    `/image PATH` in a chat attaches a picture to the next message, `/audio PATH` a sound.
    """
    check_tokens("max_new_tokens", max_new_tokens)
    if system is not None:
        system = text_of(system, "the system prompt")
    terminal = stdio(json=False, quiet=verbosity.quiet)
    progress = StatusLine(max_new_tokens)
    with ExitStack() as stack:
        with terminal.showing(progress.describe):
            loaded = stack.enter_context(library.opened(model, options, progress.report))
        progress.watch(loaded)
        talk = Conversation(loaded, model, system, sampling, max_new_tokens, options.context, terminal.note)
        talk.check()
        notes = Notes(None if verbosity.quiet else terminal.note)
        notes.loaded(loaded)
        if not verbosity.quiet:
            output.tell("/help lists the commands, Ctrl-D ends.")
        messages = Messages()
        while (message := _next(messages)) is not None and not leaves(message):
            if (said := _obeyed(message, talk)) is None:
                _answer(talk, message, terminal, progress, notes, quiet=verbosity.quiet)
            elif said and not verbosity.quiet:
                output.tell(said)


def _obeyed(message: str, talk: Conversation) -> str | None:
    """Do what a command says; what there is to tell, or None where the message is no command but a question."""
    word, _, rest = message.partition(" ")
    if message == "/reset":
        talk.reset()
        return "the conversation is forgotten"
    if message == "/help":
        output.tell(_HELP)
    elif word in ATTACH:
        try:
            return talk.attach(word, rest.strip())
        except RequestError as error:
            output.tell(f"lamina: {one_line(error)}")
    elif message.startswith("/") and message[1:].isalpha():
        output.tell(f"lamina: no command {message}: /help lists them")
    elif message:
        return None
    return ""


class Conversation:
    """What has been said so far, and the model that answers it.

    Args:
        context: the most tokens of conversation and answer; None: as many as the model and the memory take.
        note: is called with a line that says what was dropped.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        system: str | None,
        sampling: Sampling,
        max_new_tokens: int,
        context: int | None,
        note: Callable[[str], None],
    ) -> None:
        self.model = model
        self.messages: list[Message] = []
        self._attached: list[Attachment] = []  # to the next message
        self._name = name
        self._begun = [] if system is None else [{"role": "system", "content": system}]
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        limits = [tokens for tokens in (context, most_tokens(model)) if tokens is not None]
        self._limit = min(limits, default=MOST_TOKENS)
        self._chosen = self._limit == context  # and not the model's own
        self._note = note
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self._attached = []
        self.messages = list(self._begun)

    def attach(self, command: str, path: str) -> str:
        """Attach a file to the next message; what to tell about it.

        Raises:
            RequestError: it cannot be.
        """
        check_number(len(self._attached) + 1)
        attached = open_typed(command, path, self.model)
        self._attached.append(attached)
        return f"{os.path.basename(attached.path)} goes with the next message"

    def check(self) -> None:
        """Raise now what the first question would raise: no tokenizer or chat template, a system prompt too long."""
        _, tokens = self._encoded([*self._begun, _said("user", "?")])
        if tokens >= self._limit:
            what = "the system prompt takes" if self._begun else "the shortest question takes"
            raise RequestError(f"{what} {tokens} tokens, the context has {self._limit}: {option('context')} gives more")

    def ask(
        self, question: str, write: Callable[[str], None], count: Callable[[int], None], stopped: Callable[[], bool]
    ) -> int:
        """Answer `question`, with what is attached to it, and remember them and the answer.

        An answer that was stopped is remembered as far as it came. Turns that there is no room for any more, in the
        context or in memory, are forgotten, the oldest first.

        Returns:
            How many tokens the answer has.

        Raises:
            RequestError: the question cannot be answered, such as one longer than the context; it is forgotten.
        """
        before, noted, asked = self.messages, False, _said("user", content_of(self._attached, question))
        self._attached = []
        pieces: list[str] = []
        tokens = 0

        def show(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        def tell() -> None:
            nonlocal noted
            if not noted:
                self._say_dropped((len(before) - len(self.messages)) // 2)
            noted = True

        def counted(new: int) -> None:
            nonlocal tokens
            tell()
            tokens += new
            count(new)

        while True:
            try:
                inputs, most = self._fitting(asked)
                with suppress(KeyboardInterrupt):
                    self._generate(inputs, min(self._max_new_tokens, most), show, counted, stopped)
            except BudgetError as error:
                if tokens:
                    self._note(f"lamina: the answer ends here, for want of memory: {one_line(error)}")
                elif self._forget_oldest():
                    continue
                else:
                    self.messages = before
                    raise
            tell()
            self.messages = [*self.messages, asked, _said("assistant", "".join(pieces))]
            return tokens

    def _generate(
        self,
        inputs: dict[str, Any],
        most: int,
        write: Callable[[str], None],
        count: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Answer with `most` tokens or fewer."""
        tokenizer = self.model.tokenizer
        generate(self.model, inputs, self._sampling, most, write, tokenizer=tokenizer, count=count, stopped=stopped)

    def _say_dropped(self, turns: int) -> None:
        """Say that so many turns were forgotten, if any was."""
        if turns:
            dropped = "turn was" if turns == 1 else f"{turns} turns were"
            self._note(f"lamina: the oldest {dropped} dropped to make room (/reset forgets the whole conversation)")

    def _fitting(self, asked: Message) -> tuple[dict[str, Any], int]:
        """The inputs for a question, after as many turns as fit the context; and how many tokens its answer may have.

        Raises:
            RequestError: the question alone is longer than the context.
        """
        inputs, tokens = self._encoded([*self.messages, asked])
        wanted = min(self._max_new_tokens, max(self._limit // SHARE_FOR_ANSWER, 1))
        if tokens + wanted > self._limit:
            _, alone = self._encoded([*self._begun, asked])
            if alone >= self._limit:
                more = f", or begin the chat with a larger {option('context')}" if self._chosen else ""
                has = f"the context has {self._limit}"
                raise RequestError(f"this message takes {alone} tokens, {has}: shorten it{more}")
        while tokens + wanted > self._limit and self._forget_oldest():
            inputs, tokens = self._encoded([*self.messages, asked])
        return inputs, self._limit - tokens

    def _encoded(self, messages: list[Message]) -> tuple[dict[str, Any], int]:
        inputs = encode_chat(self.model, self._name, messages)
        return inputs, len(inputs["input_ids"][0])

    def _forget_oldest(self) -> bool:
        """Forget the oldest question and its answer; False where there is none."""
        first = len(self._begun)
        if len(self.messages) <= first:
            return False
        self.messages = self.messages[:first] + self.messages[first + 2 :]
        return True


def _said(role: str, content: str | list[Attachment | str]) -> Message:
    return {"role": role, "content": content}


def _next(messages: Messages) -> str | None:
    """The next message; one that is not text is refused in a line, and the chat continues."""
    while True:
        try:
            return messages.next()
        except RequestError as error:
            output.tell(f"lamina: {one_line(error)}")


def _answer(
    talk: Conversation, question: str, terminal: Terminal, progress: StatusLine, notes: Notes, *, quiet: bool
) -> None:
    progress.begin()
    before = library.as_dict(talk.model.lamina.stats)
    try:
        with terminal.showing(progress.describe), _interrupt_once(progress) as stopped:
            tokens = talk.ask(question, terminal.write, progress.count, stopped)
    except RequestError as error:
        output.tell(f"lamina: {one_line(error)}")
        return
    terminal.write("\n")
    stats = library.as_dict(talk.model.lamina.stats)
    notes.answered(stats)
    if not quiet:
        output.tell(report.summary(report.of_one_answer(before, stats, progress), tokens))


@contextmanager
def _interrupt_once(progress: StatusLine) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is a request, which the yielded function reports; the second is a KeyboardInterrupt."""
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        progress.note = "stopping at the next token; Ctrl-C again stops at once"

    try:
        with interrupt.Apart(handle):
            yield lambda: pressed
    finally:
        progress.note = None


def open_typed(command: str, path: str, model: Any) -> Attachment:
    """What a command of a chat attaches, its path with or without the quotes that a terminal puts around a drop.

    Raises:
        RequestError: it cannot be read, or the model has no inputs for it.
    """
    if not path:
        raise RequestError(f"{command} needs a path: {command} PATH")
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" and not os.path.exists(path):
        path = path[1:-1]
    attached = ATTACH[command](path)
    check_taken(model, [attached])
    return attached
