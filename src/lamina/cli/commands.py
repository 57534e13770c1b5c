"""`run`, `plan` and `bench`: one request, one result. `chat` has a file of its own."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from lamina.cli import library, output, report
from lamina.cli.generation import Notes, encode, generate, read_prompt
from lamina.cli.live import StatusLine, stdio
from lamina.cli.options import (
    Json,
    MaxNewTokens,
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
from lamina.messages import attachments

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
    max_new_tokens: MaxNewTokens = 64,
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
    request = read_prompt(model, prompt, prompt_ids, chat=chat, image=image, audio=audio)
    attached = attachments.opened(image or (), audio or ())  # before the model, whose memory is what they leave
    terminal = stdio(json=json, quiet=verbosity.quiet)
    progress = StatusLine(max_new_tokens)
    notes = Notes(None if verbosity.quiet else terminal.note)
    aside = contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()  # what a library prints
    with aside, terminal.showing(progress.describe), library.opened(model, options, progress.report) as loaded:
        progress.watch(loaded)
        inputs = encode(loaded, model, request, attached, chat=chat)
        notes.loaded(loaded)
        write = (lambda piece: None) if json else terminal.write
        tokenizer = _tokenizer(loaded, needed=prompt_ids is None)
        tokens, text = generate(
            loaded, inputs, sampling, max_new_tokens, write, tokenizer=tokenizer, count=progress.count
        )
        stats = library.as_dict(loaded.lamina.stats)
    if json:
        output.put(report.as_json({"text": text, "tokens": tokens, "stats": stats}))
    else:
        terminal.write("\n")
    notes.answered(stats)
    if not verbosity.quiet:
        output.tell(report.summary(stats, len(tokens)))


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
    with contextlib.redirect_stdout(sys.stderr), stdio(json=True, quiet=verbosity.quiet).showing(progress.describe):
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
    with contextlib.redirect_stdout(sys.stderr), terminal.showing(progress.describe):
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


def _tokenizer(model: Any, *, needed: bool) -> Any | None:
    """The model's tokenizer; None where it has none and the prompt did not need one."""
    try:
        model.tokenizer.decode([])  # it is loaded, and found missing, when it is first used
        return model.tokenizer
    except RequestError:
        if needed:
            raise
        return None
