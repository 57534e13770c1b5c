"""Whether two models mean the same by a token."""

from __future__ import annotations

import json
import os
from typing import Any

from lamina.errors import RequestError
from lamina.hf.building.build import Request
from lamina.hf.tokenizer import load_tokenizer
from lamina.runtime.describe import Described

FILE = "tokenizer.json"
MOSTLY = 0.9  # of the model's tokens a draft must have; one may have special tokens that the other lacks


def check_same_tokens(target: Described, draft: Described, name: str) -> None:
    """Refuse a draft whose tokens are not the target's.

    Args:
        name: of the draft, as it was asked for.

    Raises:
        RequestError: a token means two things, or only one of the two has a tokenizer.
    """
    both = [_vocabulary(each.request) for each in (target, draft)]
    sizes = [_size(each.model.config) for each in (target, draft)]
    if all(each is None for each in both):
        if sizes[0] != sizes[1]:
            raise RequestError(
                f"the draft {name} has {sizes[1]} tokens and the model {sizes[0]}: a draft needs the model's own tokens"
            )
        return
    for each, described in zip(both, (target, draft), strict=True):
        if each is None:
            raise RequestError(
                f"no tokenizer in {described.request.folder}: whether the draft {name} has the model's tokens cannot "
                f"be told"
            )
    ours, theirs = both
    assert ours is not None and theirs is not None
    named = {number: token for token, number in ours.items()}
    other = [(token, number) for token, number in theirs.items() if ours.get(token, number) != number]
    other += [(token, number) for token, number in theirs.items() if named.get(number, token) != token]
    alike = sum(ours.get(token) == number for token, number in theirs.items())
    if not other and alike >= MOSTLY * len(ours):
        return
    example = ""
    if other:
        token, number = min(other, key=lambda each: each[1])
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
