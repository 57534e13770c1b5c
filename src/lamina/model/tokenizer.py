"""`model.tokenizer`, loaded when it is first used, so that a folder without one still runs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lamina.caller import token_ids_instead
from lamina.errors import RequestError

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))  # the first there counts
TIMES_ITS_FILE = 16


class LazyTokenizer:
    """Stands for a tokenizer until somebody uses it; then the model's attribute is the real one."""

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        object.__setattr__(self, "_owner", weakref.ref(model))
        object.__setattr__(self, "_load", load)
        object.__setattr__(self, "_real", None)

    def _get(self) -> Any:
        real = object.__getattribute__(self, "_real")
        if real is None:
            real = object.__getattribute__(self, "_load")()
            object.__setattr__(self, "_real", real)
            model = object.__getattribute__(self, "_owner")()
            if model is not None:
                model.tokenizer = real
        return real

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._get())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._get(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get()(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._get())

    def __contains__(self, token: object) -> bool:
        return token in self._get()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._get())

    def __repr__(self) -> str:
        real = object.__getattribute__(self, "_real")
        return repr(real) if real is not None else "<tokenizer, not loaded yet>"


def tokenizer_bytes(folder: str) -> int:
    """Memory that the tokenizer of a folder takes at the most while it is loaded, from the size of its files.

    Measured with transformers 5.23: 172 MB for a `tokenizer.json` of 11.4 MB, 60 MB for one of 3.5 MB.
    """
    for files in VOCABULARIES:
        sizes = [os.path.getsize(path) for name in files if os.path.isfile(path := os.path.join(folder, name))]
        if sizes:
            return TIMES_ITS_FILE * sum(sizes)
    return 0


def load_tokenizer(folder: str, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        RequestError: there is none, or transformers cannot load it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise RequestError(f"no usable tokenizer in {folder}: {text[:200]}; {token_ids_instead()}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes such a one where there are no files
        raise RequestError(f"no tokenizer in {folder}: {token_ids_instead()}")
    return tokenizer
