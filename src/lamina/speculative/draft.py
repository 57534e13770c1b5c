"""What proposes tokens: the face that every kind of draft has, and what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Pick = Callable[[int, torch.Tensor], tuple[int, float]]
"""(position, logits of shape (vocabulary,)) -> the token that the target would take there from these logits, and how
confident that is: from 0, a coin, to 1. Position 0 is the next token of the text."""

GoOn = Callable[[float], bool]
"""Given the confidence of the last token: whether another one is worth its time."""


@dataclass(slots=True)
class Proposal:
    """A chain of tokens that may come next.

    Attributes:
        tokens: in order; empty where there is nothing to propose.
        confidence: of each token, from 0 to 1: how likely the target takes it, if it took those before.
    """

    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Draft(Protocol):
    """Proposes what may come next. One generation at a time.

    Attributes:
        name: as it was asked for: `self`, `lookup`, or the model.
    """

    name: str

    def begin(self, prompt: list[int], cache: Any) -> str | None:
        """A new text begins.

        Args:
            prompt: its tokens so far.
            cache: the target's, after its first pass; it holds every token of `prompt`.

        Returns:
            Why this draft cannot follow this text; None where it can.
        """
        ...

    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        """What may come next.

        Args:
            text: all tokens so far: what it was the last time, with some more at its end. The target's cache holds
                all of them but the last, and is to be left so.
            most: tokens at most; at least 1.
            go_on: asked after each token; a draft that has its tokens all at once need not ask.
            pick: chooses a token from logits.
        """
        ...
