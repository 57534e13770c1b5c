"""A draft for tests: how well it predicts the answer is fixed beforehand."""

from __future__ import annotations

from typing import Any

from lamina.speculative.draft import GoOn, Pick, Proposal


class Wavering:
    """Knows the answer and is wrong at every fifth token, in drafts of changing length."""

    name = "oracle"

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def begin(self, prompt: list[int], cache: Any) -> str | None:
        return None

    def propose(self, text: list[int], most: int, go_on: GoOn, pick: Pick) -> Proposal:
        count = 1 + len(text) % 7
        tokens = [self.answer[i] ^ (i % 5 == 0) for i in range(len(text), min(len(text) + count, len(self.answer)))]
        return Proposal(tokens[:most], [0.99] * len(tokens[:most]))
