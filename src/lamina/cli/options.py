"""The options that several commands share, each declared once.

A command takes them as frozen dataclasses; `expand` shows typer one option for each field. The dataclasses check
what can be checked without looking at a model, so that a mistyped size is answered before torch is imported.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from lamina.caller import FLAGS, Command, option, speaking
from lamina.checkpoint.manifest import check_compression
from lamina.errors import RequestError
from lamina.sizes import parse_memory

LEAST_TEMPERATURE = 1e-4  # below it the quotients are no numbers any more
MOST_TOKENS = 2**31 - 1
THREADS_OF_ONE = 4  # processor: more only wait
KEYWORDS = {flag: keyword for keyword, flag in FLAGS.items()}  # what the library calls otherwise
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A local folder or file, or a Hugging Face id; with :FILE or :Q4_K_M one GGUF file of it."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="The longest answer.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]


@dataclass(frozen=True)
class SourceOptions:
    """Where the checkpoint comes from: what `lamina.store.split` is given besides its own arguments."""

    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads for the arithmetic.")] = None
    revision: Annotated[str | None, typer.Option(metavar="REF", help="Branch, tag or commit on the hub.")] = None
    gguf_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Which GGUF file of the folder or repository; as MODEL:FILE.")
    ] = None
    cache_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where hub downloads are kept.")] = None
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Hub token. Default: HF_TOKEN or the saved login.")
    ] = None
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is already on this machine.")] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_folder("cache_dir", self.cache_dir)

    def as_kwargs(self) -> dict[str, Any]:
        """What was asked for, under the library's names; the rest is left to its defaults.

        The options of the process and of the command itself are left out.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            KEYWORDS.get(name, name): value
            for name, value in given.items()
            if name not in ("threads", "verify") and value is not None and value is not False
        }


@dataclass(frozen=True)
class ModelOptions(SourceOptions):
    """How to open the model: what `AutoModel.from_pretrained` is given."""

    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the whole process, e.g. 4GB. Default: what is free.")
    ] = None
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory on the accelerator, e.g. 4GB. Default: what is free.")
    ] = None
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1. Default: auto.")] = None
    context: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens of context to keep memory for.")] = (
        None
    )
    compression: Annotated[
        str | None, typer.Option(metavar="CODEC", help="How the weights are stored: 8bit, 4bit, lossless.")
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFT",
            help="What proposes tokens, so that a pass gives several: none, auto, lookup (what followed the last words "
            "before), self (a copy of the model in 4 bits, written on first use), or a smaller model. Default: auto; "
            "bench: none.",
        ),
    ] = None
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Verify a draft to the very bits of one token at a time. Always so with auto."),
    ] = False
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose products of a few rows: torch (the default: the bits of plain transformers), lamina (a row has "
            "the same bits in any company), auto.",
        ),
    ] = None
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, bfloat16, float16, float32. Default: as stored.")
    ] = None
    attn_implementation: Annotated[
        str | None, typer.Option(metavar="NAME", help="transformers' attention: sdpa, eager, ...")
    ] = None
    verify: Annotated[bool, typer.Option("--verify", help="Compare a split model's checksums before it is used.")] = (
        False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory", "device_memory"):
            if (value := getattr(self, name)) is not None:
                parse_memory(value, what=option(name))
        if self.compression is not None:
            check_compression(self.compression)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"{option('dtype')} {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.context is not None:
            check_tokens("context", self.context)

    def as_kwargs(self) -> dict[str, Any]:
        """As of `SourceOptions`, with sizes as bytes."""
        kwargs = super().as_kwargs()
        for name in ("memory", "device_memory"):
            if name in kwargs:
                kwargs[name] = parse_memory(kwargs[name])
        return kwargs


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one, unless an option asks for chance."""

    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.0, help="Sample at this temperature. Default: no sampling.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="Sample from the likeliest, up to this share.")
    ] = None
    top_k: Annotated[int | None, typer.Option(metavar="K", min=1, help="Sample from the K likeliest tokens.")] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")] = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise RequestError(f"{option(name)} must be a number, got {value}")
        if self.temperature and self.temperature < LEAST_TEMPERATURE:
            given = option("temperature", self.temperature)
            raise RequestError(f"{given} is too little to sample with: give 0 for the likeliest token")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise RequestError(f"{option('seed')} must be 0 to {2**64 - 1}, got {self.seed}")

    def as_kwargs(self) -> dict[str, Any]:
        """The arguments of `generate`. A temperature of 0 means no sampling."""
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in chosen.items() if value is not None}
        if not given or self.temperature == 0:
            # None overrides what the model's generation_config says, which would be warned about.
            return {"do_sample": False, **dict.fromkeys(chosen)}
        return {"do_sample": True, **given}


@dataclass(frozen=True)
class Verbosity:
    """What is shown beside the result."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def check_threads(threads: int | None) -> None:
    """Refuse many more threads than there are processors: each would wait for the others, thousands for ever."""
    here = os.cpu_count() or 1
    most = THREADS_OF_ONE * here
    if threads is not None and threads > most:
        processors = "1 processor" if here == 1 else f"{here} processors"
        raise RequestError(f"{option('threads', threads)} is too many for the {processors} here: give at most {most}")


def check_tokens(name: str, tokens: int) -> None:
    """Refuse a number of tokens that no text has."""
    if tokens > MOST_TOKENS:
        raise RequestError(f"{option(name)} must be at most {MOST_TOKENS} tokens, got {tokens}")


def check_folder(name: str, folder: str | None) -> None:
    """Refuse what is there and is no folder."""
    if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
        raise RequestError(f"{option(name)} {folder} is no folder")


def check_file_to_write(name: str, file: str) -> None:
    """Refuse a file that cannot be written, before there is something to write."""
    folder = os.path.dirname(os.path.abspath(file))
    if os.path.isdir(file):
        raise RequestError(f"{option(name)} {file} is a folder: name a file")
    if not os.path.isdir(folder):
        raise RequestError(f"{option(name)} {file}: there is no folder {folder}")
    if not os.access(file if os.path.exists(file) else folder, os.W_OK):
        raise RequestError(f"{option(name)} {file} may not be written by this user: choose another place")


def parse_prompt_ids(text: str) -> list[int]:
    """`"1,2,3"` as `[1, 2, 3]`.

    Raises:
        RequestError: something in it is not a token id.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise RequestError(f"{option('prompt_ids')} {shown!r} is not a list of token ids: write for example 1,2,3")
    if wrong := next((part for part in parts if len(part) > 18), None):
        raise RequestError(f"{option('prompt_ids')}: there is no token {wrong[:18]}..., of any model")
    return [int(part) for part in parts]


def check_prompt_ids(ids: list[int], vocabulary: int | None) -> None:
    """Refuse token ids that the model does not have, as far as its vocabulary is known.

    Raises:
        RequestError: it names the first.
    """
    if vocabulary and (wrong := next((token for token in ids if token >= vocabulary), None)) is not None:
        raise RequestError(
            f"{option('prompt_ids')}: this model has no token {wrong}, its tokens are 0 to {vocabulary - 1}"
        )


def vocabulary_of(model: str) -> int | None:
    """How many tokens a local model has, where its config gives the number itself; nothing is imported for it."""
    try:
        with open(os.path.join(os.path.expanduser(model), "config.json"), encoding="utf-8") as opened:
            config = json.load(opened)
        found = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is said when it is opened
    return found if isinstance(found, int) else None


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Let `command` take options as dataclasses: typer sees one option for each of their fields."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}

    @functools.wraps(command)
    def call(**values: Any) -> None:
        with speaking(Command(command.__name__, dict(values))):
            for name, shown in (("model", "MODEL"), ("folder", "DIR"), ("to", "--to")):
                if values.get(name) == "":
                    raise RequestError(f"{shown} is empty: name a folder" + ", a file or a hub id" * (name == "model"))
            grouped = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            command(**values, **grouped)

    shown: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.name in groups:
            group = groups[parameter.name]
            hints = get_type_hints(group, include_extras=True)
            shown += [_parameter(field, hints[field.name]) for field in _own_first(group)]
        else:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return call


def _own_first(group: Any) -> list[Field[Any]]:
    """The options of a group, those that it has of another at the end."""
    inherited = {field for base in group.__bases__ if is_dataclass(base) for field in fields(base)}
    return sorted(fields(group), key=lambda field: field in inherited)


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
