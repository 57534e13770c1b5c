"""`model.tokenizer` and `model.processor`, loaded when they are first used, so that a folder without one still runs."""

from __future__ import annotations

import os
import textwrap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_torchvision_available

from lamina.caller import token_ids_instead
from lamina.checkpoint.mistaken import unreadable_in
from lamina.errors import CheckpointError, RequestError
from lamina.hf.config import read_json
from lamina.hf.internals import without_video

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))  # the first there counts
FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "config.json"),
)
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TIMES_ITS_FILE = 15


class Lazy:
    """Stands for a tokenizer or a processor until it is used; then the model's attribute is the real one.

    Args:
        name: of the attribute.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], Any], name: str = "tokenizer") -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_owner", weakref.ref(model))
        object.__setattr__(self, "_load", load)
        object.__setattr__(self, "_real", None)

    def real(self) -> Any:
        """What it stands for, loaded now if it was not."""
        real = object.__getattribute__(self, "_real")
        if real is None:
            real = object.__getattribute__(self, "_load")()
            object.__setattr__(self, "_real", real)
            model = object.__getattribute__(self, "_owner")()
            if model is not None:
                setattr(model, object.__getattribute__(self, "_name"), real)
        return real

    def forget(self) -> None:
        """Let its memory go, if the model's is still this one: it is loaded again where it is used."""
        model, name = object.__getattribute__(self, "_owner")(), object.__getattribute__(self, "_name")
        real = object.__getattribute__(self, "_real")
        if model is not None and real is not None and getattr(model, name) is real:
            object.__setattr__(self, "_real", None)
            object.__setattr__(model, name, self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.real())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.real()(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.real())

    def __contains__(self, token: object) -> bool:
        return token in self.real()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.real())

    def __repr__(self) -> str:
        real = object.__getattribute__(self, "_real")
        return repr(real) if real is not None else f"<{object.__getattribute__(self, '_name')}, not loaded yet>"


def tokenizer_bytes(folder: str) -> int:
    """Memory that the tokenizer of a folder takes, from the size of its files.

    Measured with transformers 5.24: 132 to 140 MB for a `tokenizer.json` of 11.4 MB, 48 to 53 MB for one of 3.5 MB.
    """
    for files in VOCABULARIES:
        sizes = [os.path.getsize(path) for name in files if os.path.isfile(path := os.path.join(folder, name))]
        if sizes:
            return TIMES_ITS_FILE * sum(sizes)
    return 0


def load_tokenizer(folder: str, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        RequestError: there is none, or transformers cannot load it or use it; the message names the file.
    """

    def load() -> PreTrainedTokenizerBase:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
        return loaded

    place = os.path.join(folder, options.get("subfolder") or "")
    tokenizer = usable(load, folder, lambda: _at_fault(place))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes such a one where there are no files
        raise RequestError(f"no tokenizer in {folder}: {token_ids_instead()}")
    return tokenizer


def load_processor(
    folder: str, trust_remote_code: bool, tokenizer: Callable[[], PreTrainedTokenizerBase], **options: Any
) -> Any:
    """What makes a model's inputs of text, pictures and sound: the processor of a checkpoint folder.

    Args:
        tokenizer: gives the model's own. It is the processor of a model that has no other, and stands in a
            processor that brings the same one, so that there is one in memory.

    Raises:
        RequestError: there is none, or transformers cannot load it.
    """
    place = os.path.join(folder, options["subfolder"]) if options.get("subfolder") else folder
    if not trust_remote_code and not any(os.path.isfile(os.path.join(place, name)) for name in PROCESSORS):
        return tokenizer()
    try:
        processor = _processor(folder, trust_remote_code=trust_remote_code, **options)
    except BaseException as error:
        text = _failure(error)
        why = unreadable_in(place, (*PROCESSORS, *FILES))
        raise RequestError(f"no usable processor in {place}: {why or text}; model.tokenizer takes text") from error
    if isinstance(processor, PreTrainedTokenizerBase):
        return tokenizer()
    if (own := getattr(processor, "tokenizer", None)) is not None:
        ours = tokenizer()
        if type(ours) is type(own) and len(ours) == len(own):
            processor.tokenizer = ours
    return processor


def _processor(folder: str, **options: Any) -> Any:
    """A processor; where torchvision is missing and it is wanted for videos alone, one that takes no videos."""
    from transformers import AutoProcessor  # 2 MB of modules that text alone does not need

    try:
        return AutoProcessor.from_pretrained(folder, **options)
    except (ImportError, ValueError) as error:  # some say it with the one, some with the other
        if is_torchvision_available() or "torchvision" not in str(error).lower():
            raise
        with without_video():
            return AutoProcessor.from_pretrained(folder, **options)


def _failure(error: BaseException) -> str:
    """What transformers says of a failure, in one line; raised again where it is none of a file.

    What the tokenizers package raises is an Exception of no class of its own; a panic in it is not even that.
    """
    if isinstance(error, MemoryError) or not (isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"):
        raise error
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):  # after which package is missing, how to install it everywhere
        text = text.partition(". ")[0]
    return textwrap.shorten(text, 200, placeholder="...") or type(error).__name__


def usable(
    load: Callable[[], PreTrainedTokenizerBase], place: str, at_fault: Callable[[], str | None] = lambda: None
) -> PreTrainedTokenizerBase:
    """A tokenizer that was tried on a word, for some that load fail with any text.

    Args:
        load: makes it.
        place: where it comes from, for an error.
        at_fault: says what is wrong with which file, after a failure; None where it cannot tell.

    Raises:
        RequestError: it cannot be loaded or used.
    """
    try:
        tokenizer = load()
        tokenizer.decode(tokenizer("a")["input_ids"])
    except BaseException as error:
        text = _failure(error)
        why = at_fault()
        where = f"{place}: {why}" if why else place
        raise RequestError(f"no usable tokenizer in {where} ({text}); {token_ids_instead()}") from error
    return tokenizer


def _at_fault(folder: str) -> str | None:
    """What is wrong with the file over which a folder's tokenizer fails, as far as its bytes and its reader tell."""
    if why := unreadable_in(folder, FILES):
        return why
    present = [name for name in FILES if os.path.isfile(os.path.join(folder, name))]
    for name in present:
        try:
            if name.endswith(".json"):
                read_json(os.path.join(folder, name))
        except CheckpointError as error:
            return str(error)
    damaged = "{} is damaged, fetch it again"
    if "tokenizer.json" in present:
        try:
            Tokenizer.from_file(os.path.join(folder, "tokenizer.json")).encode("a")
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            return damaged.format("tokenizer.json")
    return damaged.format("tokenizer_config.json") if "tokenizer_config.json" in present else None
