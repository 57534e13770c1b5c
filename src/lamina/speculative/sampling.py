"""Which token comes next, so that a draft can preview it, and what comes out never depends on the draft.

Greedy decoding takes the largest score. Sampling takes the winner of a race: token i arrives at e_i / p_i, where the
e_i are independent and exponentially distributed, and the first to arrive is i with probability p_i. That is how
`torch.multinomial` draws one sample. Here the e of each position are drawn once, and draft and target run the race of
a position with the same ones: where their distributions are alike they mostly choose alike, while the target's choice
is what it would be without a draft, token for token for the same seed. (Maximal coupling by shared randomness:
Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024.)
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from lamina.hf.decoding.custom_generate import followed
from lamina.hf.names import LogitsProcessorList


class Greedy:
    """The largest score."""

    def take(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of the text, of shape (1,), for scores of shape (1, vocabulary)."""
        return torch.argmax(scores, dim=-1)

    def preview(self, position: int, scores: torch.Tensor) -> tuple[int, float]:
        """The token that `take` would give `position` tokens later, and the confidence in it, from 0 to 1."""
        best = int(torch.argmax(scores))
        return best, float(torch.exp(scores[0, best] - torch.logsumexp(scores[0], 0)))

    def close(self) -> None:
        """Nothing was borrowed."""


class Sampled:
    """The winner of the race; see the head of this file."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._races: deque[torch.Tensor] = deque()  # of the positions to come
        self._states: deque[torch.Tensor] = deque()  # of the generator after each of them
        self._state: torch.Tensor | None = None  # after the last one that was used, or before the first

    def take(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Greedy.take`."""
        race = self._race(0, scores)
        self._races.popleft()
        self._state = self._states.popleft()
        return torch.nn.functional.softmax(scores, dim=-1).div_(race).argmax(-1)

    def preview(self, position: int, scores: torch.Tensor) -> tuple[int, float]:
        """See `Greedy.preview`. A confident choice is a winner far ahead of the second."""
        speeds = torch.nn.functional.softmax(scores, dim=-1).div_(self._race(position, scores))
        (first, second), tokens = torch.topk(speeds[0], 2)
        return int(tokens[0]), 1.0 - float(second / first)

    def close(self) -> None:
        """Give back what was drawn ahead: the generator is where it would be without a draft."""
        if self._races and self._state is not None:
            _set_state(self._like.device, self._state)
        self._races.clear()
        self._states.clear()

    def _race(self, position: int, scores: torch.Tensor) -> torch.Tensor:
        if self._state is None:
            self._state = _get_state(self._like.device)
        while len(self._races) <= position:
            self._races.append(torch.empty_like(scores).exponential_(1))
            self._states.append(_get_state(self._like.device))
        return self._races[position]


class Preview:
    """Chooses a draft's tokens as the target would choose: the same processors, the same race.

    Args:
        processors: of the generation; those that remember something are left out.
        choice: of the generation.
        ids: the text so far, of shape (1, tokens).
        vocabulary: scores that the target gives; a draft of the same tokens may be padded to another number.
    """

    def __init__(
        self, processors: LogitsProcessorList, choice: Greedy | Sampled, ids: torch.Tensor, vocabulary: int
    ) -> None:
        self._processors, self._choice, self._ids = followed(processors), choice, ids
        self._vocabulary = vocabulary
        self._tokens: list[int] = []

    def __call__(self, position: int, logits: torch.Tensor) -> tuple[int, float]:
        """See `lamina.speculative.draft.Pick`."""
        scores = logits.to(dtype=torch.float32, device=self._ids.device, copy=True).view(1, -1)
        if (missing := self._vocabulary - scores.shape[1]) != 0:
            scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)  # a negative number cuts off
        if self._processors:
            ids = self._ids
            if position:
                ids = torch.cat([ids, ids.new_tensor([self._tokens[:position]])], dim=-1)
            scores = self._processors(ids, scores)
        token, confidence = self._choice.preview(position, scores)
        self._tokens[position:] = [token]
        return token, confidence


def choice_for(do_sample: bool, like: torch.Tensor) -> Greedy | Sampled:
    """How a generation chooses.

    Args:
        like: a tensor on the device of the scores.
    """
    return Sampled(like) if do_sample else Greedy()


def _generator(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _get_state(device: torch.device) -> torch.Tensor:
    module = _generator(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "cpu" else module.get_rng_state(device)
    return state


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    module = _generator(device)
    if device.type == "cpu":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)
