"""Whether two models mean the same by a token."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from lamina.errors import RequestError
from lamina.hf.building.build import Request
from lamina.hf.tokenizer import load_tokenizer
from lamina.runtime.load import Described

FILE = "tokenizer.json"
MOSTLY = 0.9  # of the model's tokens a draft must have; one may have special tokens that the other lacks


def check_same_tokens(target: Described, draft: Described, name: str) -> None:
    """Refuse a draft whose tokens are not the target's.

    Args:
        name: of the draft, as it was asked for.

    Raises:
        RequestError: a token means two things, or only one of the two has a tokenizer.
    """
    ours, theirs = _vocabulary(target.request), _vocabulary(draft.request)
    if ours is not None and theirs is not None:
        _check_alike(ours, theirs, name)
    elif ours is not None or theirs is not None:
        without = target if ours is None else draft
        raise RequestError(
            f"no tokenizer in {without.request.folder}: whether the draft {name} has the model's tokens is unknown"
        )
    elif (size := _size(draft.model.config)) != (wanted := _size(target.model.config)):
        raise RequestError(
            f"the draft {name} has {size} tokens and the model {wanted}: a draft needs the model's own tokens"
        )


def _check_alike(ours: Mapping[str, int], theirs: Mapping[str, int], name: str) -> None:
    """Refuse a vocabulary in which a token of ours has another number, or a number of ours another token."""
    named = {number: token for token, number in ours.items()}
    other = [
        (number, token)
        for token, number in theirs.items()
        if ours.get(token, number) != number or named.get(number, token) != token
    ]
    alike = sum(ours.get(token) == number for token, number in theirs.items())
    if not other and alike >= MOSTLY * len(ours):
        return
    example = ""
    if other:
        number, token = min(other, key=lambda each: each[0])
        example = f"; token {number} is {token!r} there and {named.get(number)!r} here"
    raise RequestError(
        f"the draft {name} has other tokens than the model ({len(theirs)} and {len(ours)} of them, {alike} alike"
        f"{example}): take a draft of the same family, or 'self' or 'lookup'"
    )


def _size(config: Any) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)


def _vocabulary(request: Request) -> dict[str, int] | None:
    """Number of each token; None without a tokenizer. Read from its file where that is enough: it is smaller so."""
    if request.gguf is not None:
        return dict(request.gguf.load_tokenizer().get_vocab())
    folder = os.path.join(request.folder, request.options.get("subfolder") or "")
    try:
        with open(os.path.join(folder, FILE), encoding="utf-8") as opened:
            content: Any = json.load(opened)
        words: Any = content["model"]["vocab"]
        if isinstance(words, list):  # unigram: each with a score, its number is its place
            words = {word: number for number, (word, _) in enumerate(words)}
        vocabulary = dict(words)
        vocabulary.update((each["content"], each["id"]) for each in content.get("added_tokens", ()))
        return vocabulary
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    try:
        return dict(load_tokenizer(folder, request.trust_remote_code).get_vocab())
    except RequestError:
        return None
