"""`run`, `plan` and `bench`: one request, one result. `chat` has a file of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lamina.cli import attachments, library, output, report
from lamina.cli.attachments import Attachment
from lamina.cli.generation import Notes, encode, encode_attached, encode_chat, generate, read_prompt
from lamina.cli.live import StatusLine, Terminal, stdio, telling
from lamina.cli.options import (
    Json,
    ModelArgument,
    ModelOptions,
    Sampling,
    Verbosity,
    check_file_to_write,
    check_prompt_ids,
    check_tokens,
    parse_prompt_ids,
    vocabulary_of,
)
from lamina.errors import RequestError

TRACE = "lamina-trace.json"

Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="PATH", help="A picture to go with the prompt; may be given several times."),
]
Sounds = Annotated[
    list[str] | None,
    typer.Option("--audio", metavar="PATH", help="A sound to go with the prompt; may be given several times."),
]
PromptIds = Annotated[str | None, typer.Option(metavar="IDS", help="Token ids instead of text, e.g. 1,2,3.")]


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; standard input where omitted or -.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="The longest answer.")
    ] = 64,
    prompt_ids: PromptIds = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a question, with the chat template.")] = False,
    image: Images = None,
    audio: Sounds = None,
    json: Json = False,
    *,
    sampling: Sampling,
    options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Continue a prompt; the text streams to stdout as it is made.

    With a picture or a sound the prompt is put as a question wherever the model has a chat template.

    \b
    Examples:
      lamina run ./model "The capital of France is" --memory 4GB
      lamina run org/model "Why is the sky blue?" --chat -n 200
      lamina run ./model --json < prompt.txt > answer.json
      lamina run ./model "What is this?" --image cat.png --memory 4GB
      lamina run ./whisper --audio talk.wav
    """
    check_tokens("max_new_tokens", max_new_tokens)
    request = read_prompt(model, prompt, prompt_ids, bool(image or audio))
    _check_text(request, {"chat": chat, "image": image, "audio": audio})
    attached = attachments.opened(image or (), audio or ())  # before the model, whose memory is what they leave
    terminal = stdio(json=json, quiet=verbosity.quiet)
    progress = StatusLine(max_new_tokens)
    notes = Notes(None if verbosity.quiet else terminal.note)
    with _stdout_for_the_result(json), _shown(terminal, progress, quiet=verbosity.quiet):
        with library.opened(model, options, progress.report) as loaded:
            progress.watch(loaded)
            inputs = _inputs(loaded, model, request, attached, chat=chat)
            notes.loaded(loaded)
            write, tokenizer = _nowhere if json else terminal.write, _tokenizer(loaded, needed=prompt_ids is None)
            tokens, text = generate(
                loaded, inputs, sampling, max_new_tokens, write, tokenizer=tokenizer, count=progress.count
            )
            stats = library.as_dict(loaded.lamina.stats)
        if not json:
            terminal.write("\n")
    if json:
        output.put(report.as_json({"text": text, "tokens": tokens, "stats": stats}))
    notes.answered(stats)
    if not verbosity.quiet:
        output.tell(report.summary(stats, len(tokens)))


def _check_text(request: str | list[int], given: dict[str, Any]) -> None:
    """Refuse token ids where an option needs text."""
    if isinstance(request, list) and (wrong := next((name for name, value in given.items() if value), None)):
        raise RequestError(f"--{wrong} needs the prompt as text, not as --prompt-ids")


def _inputs(
    loaded: Any, model: str, request: str | list[int], attached: list[Attachment], *, chat: bool
) -> dict[str, Any]:
    """What the model is given for a prompt: as it is, or as a question."""
    if attached:
        return encode_attached(loaded, model, str(request), attached, chat=chat)
    return encode_chat(loaded, model, [{"role": "user", "content": str(request)}]) if chat else encode(loaded, request)


@contextlib.contextmanager
def _shown(terminal: Terminal, progress: StatusLine, *, quiet: bool) -> Iterator[None]:
    """Show how far the work is, and what is logged meanwhile."""
    with terminal.showing(progress.describe), telling(terminal, quiet=quiet):
        yield


def plan(
    model: ModelArgument,
    json: Json = False,
    *,
    options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Say what would live where, from the headers alone.

    No weight is read or downloaded.

    \b
    Examples:
      lamina plan ./model --memory 4GB
      lamina plan org/model --memory 8GB --context 8192 --json
    """
    progress = StatusLine(1)
    with _stdout_for_the_result(True), stdio(json=True, quiet=verbosity.quiet).showing(progress.describe):
        planned = library.plan(model, options, progress.report)
    output.put(report.as_json(planned) if json else report.plan_table(planned))
    if json and not verbosity.quiet:
        Notes(output.tell).answered(planned, off=False)


def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 8,
    prompt_ids: PromptIds = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time of a token goes, and write a trace of some.")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"Where --profile writes the trace. Default: {TRACE}."),
    ] = None,
    json: Json = False,
    *,
    options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Measure a generation beside what the disk can give.

    The ceiling is the same bytes of the same files, read with nothing else going on.

    \b
    Examples:
      lamina bench ./model --memory 4GB
      lamina bench ./model --memory 4GB --prompt-tokens 128 --new-tokens 16 --json
      lamina bench ./model --memory 4GB --profile --trace trace.json   (open it at https://ui.perfetto.dev)
    """
    check_tokens("prompt_tokens", prompt_tokens)
    check_tokens("new_tokens", new_tokens)
    ids = None if prompt_ids is None else parse_prompt_ids(prompt_ids)
    check_prompt_ids(ids or [], vocabulary_of(model))
    asked = _profile(profile, trace)
    progress, terminal = StatusLine(new_tokens), stdio(json=True, quiet=verbosity.quiet)
    with _stdout_for_the_result(True), _shown(terminal, progress, quiet=verbosity.quiet):
        result = library.bench(
            model, options, progress.report, prompt_tokens=prompt_tokens, new_tokens=new_tokens, prompt_ids=ids, **asked
        )
    output.put(report.as_json(result) if json else report.bench_table(result))
    if not verbosity.quiet:
        Notes(output.tell).answered(result)
    if json and profile and not verbosity.quiet:
        output.tell(report.trace_line(result["profile"]["trace"]))


def _profile(wanted: bool, trace: str | None) -> dict[str, Any]:
    """What `bench_model` is asked for a profile, once its trace can be written."""
    if trace is not None and not wanted:
        raise RequestError(f"--trace {trace} without --profile: only a profile writes a trace, give both")
    if not wanted:
        return {}
    check_file_to_write("trace", trace or TRACE)
    return {"profile": True} if trace is None else {"profile": True, "trace": trace}


@contextlib.contextmanager
def _stdout_for_the_result(alone: bool) -> Iterator[None]:
    """What a library prints meanwhile goes to stderr, so that stdout holds the result and nothing else."""
    with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
        yield


def _tokenizer(model: Any, *, needed: bool) -> Any | None:
    """The model's tokenizer; None where it has none and the prompt did not need one."""
    try:
        model.tokenizer.decode([])  # it is loaded, and found missing, when it is first used
        return model.tokenizer
    except RequestError:
        if needed:
            raise
        return None


def _nowhere(piece: str) -> None:
    del piece
