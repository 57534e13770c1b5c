"""The lookup draft: what followed the last tokens where they stood before, in the prompt or in the answer itself.

It needs no second model and no memory to speak of: at most 40 bytes a token of text. Where an answer repeats what is
already there (a function with one change, a quotation, a table), it copies long runs; elsewhere it proposes little,
with low confidence. The idea is prompt lookup decoding (Saxena 2023) and LLMA (Yang et al. 2023, arXiv:2304.04487);
what is added here is that a copied place is kept through small edits, and that edits seen once are proposed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log2
from typing import Any

from lamina.speculative.draft import GoOn, Pick, Proposal, shared
from lamina.speculative.ngrams import LONGEST, Index

WINDOW = 32
"""Where a copy broke off, its source is looked for again up to this many tokens further on."""
PATIENCE = 96
"""Tokens after which a source that is not found again is forgotten."""
EDIT = (4, 8)
"""An edit that is learnt takes at most so many tokens away and puts at most so many in their place."""

# Weights of the confidence, in log odds, in the order of `copy_features` and `edit_features`. See `Lookup`.
COPY = (-0.7, 0.84, 0.16, 0.87, -1.33, -0.47, -2.13, -2.79)
AGAIN = (0.49, 1.0, -0.77, -0.68)
INSIDE = 2.04
CEILING = 0.995
"""No token has more confidence than this: a change may begin anywhere."""
AGAIN_FROM = 0.5
"""An edit is done again from this chance on; below it, what stands there is copied."""
RATE = 0.15
"""How fast the log odds follow how right the draft was in this text."""


@dataclass(slots=True)
class Edit:
    """How many tokens are taken away, what is put in their place, and how often that was done and left undone."""

    taken: int
    inserted: tuple[int, ...]
    done: int = 1
    left: int = 0


@dataclass(slots=True)
class Place:
    """The earlier place that the text follows.

    Attributes:
        at: where its next token is; while an edit is open, where the copy broke off.
        copied: tokens that were the same, edits in between or not.
        broke: where in the text the open edit began; -1 while there is none.
    """

    at: int
    copied: int
    broke: int = -1


@dataclass(slots=True)
class CopySource:
    """A place to copy from.

    Attributes:
        at: its next token.
        length: tokens before it that are the same as those at the end of the text.
        copied: tokens copied from around it so far.
        guess: 0; or, where no copied token supports it yet: 1 a token was replaced, 2 some were inserted, 3 an edit was
            done again.
    """

    at: int
    length: int
    copied: int = 0
    guess: int = 0


@dataclass(slots=True)
class Judged:
    """A proposal, and the log odds behind it, kept until the text shows how right it was."""

    begin: int = 0
    proposal: Proposal = field(default_factory=Proposal)


def _chance(odds: float) -> float:
    return CEILING / (1 + exp(-max(-20.0, min(20.0, odds))))


def _odds(weights: Sequence[float], features: Sequence[float]) -> float:
    return sum(weight * x for weight, x in zip(weights, features, strict=True))


def copy_features(source: CopySource, steps: int, agree: float, differ: float) -> tuple[float, ...]:
    """What speaks for a copied token: the length of its match, what was copied before, other places that agree."""
    length = min(source.length + steps, LONGEST)
    return (
        1.0,
        log2(1 + length),
        log2(1 + min(source.copied, 64)),
        log2(1 + agree),
        log2(1 + differ),
        float(length <= 2),
        float(source.guess == 1 and steps == 0),
        float(source.guess == 2 and steps == 0),
    )


def edit_features(edit: Edit, source: CopySource) -> tuple[float, ...]:
    """What speaks for doing an edit again: that it was done, and not left undone, before."""
    return (1.0, log2(1 + edit.done), log2(1 + edit.left), float(edit.taken == 0))


class Lookup:
    """Proposes what followed the last tokens where they stood before.

    The likeliest source is copied: the longest match, then the latest, where the rest is equal. A source that the text
    has followed is kept through edits: where the copy breaks off, it continues where the next tokens stand in the
    source, or, before any do, behind the token that was replaced. A small edit that was done is proposed again
    where the source has the same tokens, unless the answer has left them alone more often.

    The confidence is a logistic regression over the length of the match, what was copied from the place before, and
    how many other places agree and do not; its weights were fitted to 44 greedy answers of Qwen2.5-Coder-1.5B-Instruct
    (24 functions repeated with one change, 8 of code, 6 of prose, 6 summaries). Fitted to one half of them and asked on
    the other, of the tokens said to be 0.15, 0.25, 0.36, 0.46, 0.55, 0.65, 0.75, 0.86, 0.93, 0.97 and 0.99 sure, 0.12,
    0.30, 0.40, 0.46, 0.53, 0.58, 0.75, 0.89, 0.95, 0.96 and 0.99 were right; without the functions, 0.94 of those at
    0.97 and 0.89 of those at 0.98. On top of it, the odds follow how right the draft was in this text so far. At first,
    one match of two tokens is worth 0.54, of four 0.77, of sixteen 0.93; a guess right behind a replaced token 0.09.
    """

    name = "lookup"

    def __init__(self) -> None:
        self._index = Index()
        self._restart(0)

    def _restart(self, answer: int) -> None:
        self._answer = answer
        self._place: Place | None = None
        self._edits: dict[tuple[int, ...], Edit] = {}
        self._bias = 0.0
        self._judged = Judged()

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes: 28 to 40 a token of text."""
        return self._index.nbytes

    def begin(self, prompt: list[int], cache: Any = None) -> None:
        """A new text begins; what it shares with the last one at its beginning stays indexed."""
        self._index.truncate(shared(self._index.tokens, prompt))
        self._index.extend(prompt[len(self._index) :])
        self._restart(len(prompt))

    def propose(self, text: list[int], most: int, go_on: GoOn | None = None, pick: Pick | None = None) -> Proposal:
        """What may come next, copied from the likeliest source. Neither `go_on` nor `pick` is used."""
        best = self.continuations(text, 1, most)
        self._judged = Judged(len(text), best[0] if best else Proposal())
        return self._judged.proposal

    def continuations(self, text: list[int], k: int, most: int = 16) -> list[Proposal]:
        """Up to `k` continuations, the likeliest first, no two of which begin with the same token."""
        self._read(text)
        matches = self._index.matches()
        self._settle(matches)
        sources = self._sources(matches)
        peers = [(source.at, source.length) for source in sources if source.length]
        firsts = [(self._copy(source, peers, 1), source) for source in sources]
        ranked = sorted((first for first in firsts if first[0].tokens), key=lambda first: -first[0].confidence[0])
        chosen: dict[int, Proposal] = {}
        for first, source in ranked:
            if len(chosen) < k and first.tokens[0] not in chosen:
                chosen[first.tokens[0]] = self._copy(source, peers, most)
        return list(chosen.values())

    # The text comes in.

    def _read(self, text: list[int]) -> None:
        begin = len(self._index)
        if len(text) < begin:
            self.begin(text)
        self._index.extend(text[begin:])
        self._judge()
        for end in range(begin + 1, len(text) + 1):
            self._follow(end)

    def _judge(self) -> None:
        """Moves the bias by how far each judged token's confidence was off."""
        known, judged = self._index.tokens, self._judged
        for i, (token, confidence) in enumerate(
            zip(judged.proposal.tokens, judged.proposal.confidence, strict=True), judged.begin
        ):
            if i >= len(known):
                break
            right = token == known[i]
            self._bias = max(-2.0, min(2.0, self._bias + RATE * (right - confidence)))
            if not right:
                break
        self._judged = Judged()

    def _follow(self, end: int) -> None:
        """One more token, the last before `end`: does the text still follow its place?"""
        place, known = self._place, self._index.tokens
        if place is None:
            return
        if place.broke < 0:
            if known[place.at] == known[end - 1]:
                if edit := self._edit(known[place.at - 1], place.at):
                    edit.left += 1
                place.at += 1
                place.copied += 1
                return
            place.broke = end - 1
        at, length = self._again(place, end)
        if length >= 2:
            self._learn(place, at - length, end - length)
            self._place = Place(at, place.copied + length)
        elif end - place.broke > PATIENCE:
            self._place = None

    def _again(self, place: Place, end: int) -> tuple[int, int]:
        """Where the source continues after an open edit: the position, and how many tokens agree with it."""
        best = (place.at, 0)
        last = self._answer if place.at < self._answer else place.broke  # a source in the prompt continues there
        for at in range(place.at + 1, min(place.at + WINDOW, last) + 1):
            length = self._index.same(at, end, min(4, at - place.at, end - place.broke))
            if length > best[1]:
                best = (at, length)
        return best

    def _settle(self, matches: list[tuple[int, int]]) -> None:
        """Takes a place to follow, where there is none or where the text has left it and is sure to follow another."""
        place = self._place
        if matches and (matches[0][1] >= 4 if place is None else place.broke >= 0 and matches[0][1] >= 8):
            self._place = Place(*matches[0])

    # Edits.

    def _learn(self, place: Place, until: int, end: int) -> None:
        """An edit is closed: the source from `place.at` to `until` became the text from `place.broke` to `end`."""
        known = self._index.tokens
        inserted = tuple(known[place.broke : end])
        if until - place.at > EDIT[0] or len(inserted) > EDIT[1] or place.at == 0:
            return
        taken = tuple(known[place.at : until])
        key = taken or (-1, known[place.at - 1])
        edit = self._edits.get(key)
        if edit is not None and edit.inserted == inserted:
            edit.done += 1
            return
        # Where these tokens stand unchanged earlier in the answer, they were left alone.
        kept = key if taken else key[1:]
        begin, end = max(self._answer, place.broke - 256), place.broke - len(key)
        left = sum(tuple(known[i : i + len(kept)]) == kept for i in range(begin, end))
        self._edits[key] = Edit(len(taken), inserted, left=left)

    def _edit(self, before: int, at: int) -> Edit | None:
        """The edit that was done before to what stands at `at`, or after the token `before`."""
        if self._edits:
            known = self._index.tokens
            for taken in range(min(EDIT[0], len(known) - at), 0, -1):
                if edit := self._edits.get(tuple(known[at : at + taken])):
                    return edit
            return self._edits.get((-1, before))
        return None

    # How likely it is.

    def _copy_chance(self, source: CopySource, steps: int, agree: float, differ: float) -> float:
        """The chance of the token `steps` after the first that is copied from `source`."""
        return _chance(self._bias + _odds(COPY, copy_features(source, steps, agree, differ)))

    def _edit_chance(self, edit: Edit, source: CopySource) -> float:
        """The chance that an edit is done again."""
        return _chance(self._bias + _odds(AGAIN, edit_features(edit, source)))

    # What may come next.

    def _sources(self, matches: list[tuple[int, int]]) -> list[CopySource]:
        known, end, place = self._index.tokens, len(self._index), self._place
        sources = {at: CopySource(at, length) for at, length in matches}
        if place is None:
            return list(sources.values())
        if place.broke < 0:
            sources[place.at] = CopySource(place.at, self._index.same(place.at, end), place.copied)
            return list(sources.values())
        at, length = self._again(place, end)
        if length:
            sources[at] = CopySource(at, self._index.same(at, end), place.copied)
        edit = self._edit(known[place.at - 1], place.at)
        if edit and edit.inserted == tuple(known[place.broke :]):
            at = place.at + edit.taken
            sources[at] = CopySource(at, min(place.copied, LONGEST), place.copied, 3)
        instead = place.at + end - place.broke
        sources.setdefault(instead, CopySource(instead, 0, place.copied, 1))
        sources.setdefault(place.at, CopySource(place.at, 0, place.copied, 2))
        return [source for source in sources.values() if source.at < end]

    def _copy(self, source: CopySource, peers: list[tuple[int, int]], most: int) -> Proposal:
        """The tokens from `source` on, known edits done again, with the chance of each."""
        chain = _Chain(self._index.tokens, source.at, [peer for peer in peers if peer[0] != source.at])
        edited = source.at if source.guess else -1
        while len(chain.tokens) < most and chain.goes_on:
            edit = self._edit(chain.token(chain.at - 1), chain.at) if source.copied and chain.at != edited else None
            confidence = self._edit_chance(edit, source) if edit else 0.0
            if edit and confidence > AGAIN_FROM:
                chain.edit(edit, confidence)
                edited = chain.at
                continue
            agree, differ = chain.votes(source.length)
            chain.copy((1 - confidence) * self._copy_chance(source, len(chain.tokens), agree, differ))
        return Proposal(chain.tokens[:most], chain.confidence[:most])


class _Chain:
    """Tokens as they are copied, one after another, from a place of a text.

    Args:
        known: the text.
        at: place of the next token to copy.
        peers: other places that the text may continue from, each with how many tokens agree with it.

    Attributes:
        tokens, confidence: of those copied so far.
    """

    def __init__(self, known: Sequence[int], at: int, peers: list[tuple[int, int]]) -> None:
        self.at, self.tokens, self.confidence = at, list[int](), list[float]()
        self._known, self._peers = known, peers
        self._so_far = 1.0  # the chance of the deletions before the next token

    @property
    def goes_on(self) -> bool:
        """Whether there is a next token."""
        return self.at < len(self._known) + len(self.tokens)

    def token(self, position: int) -> int:
        """The token at a place, which may be past the end of the text: a copy continues into itself."""
        end = len(self._known)
        return self._known[position] if position < end else self.tokens[position - end]

    def votes(self, length: int) -> tuple[float, float]:
        """How much speaks for the next token from other places, and how much for another one.

        Args:
            length: tokens that speak for the place that is copied from.
        """
        agree, every = (
            sum(theirs / max(length, theirs) for _, theirs in peers) for peers in (self._agreeing, self._peers)
        )
        return agree, every - agree

    @property
    def _agreeing(self) -> list[tuple[int, int]]:
        """The other places that have the same next token."""
        steps, token = len(self.tokens), self.token(self.at)
        return [peer for peer in self._peers if self.token(peer[0] + steps) == token]

    def copy(self, chance: float) -> None:
        """The next token, as it is there; places that have another one are left."""
        self._peers = self._agreeing
        self._add(self.token(self.at), chance)
        self.at += 1

    def edit(self, edit: Edit, chance: float) -> None:
        """What an edit puts in the place of the next tokens."""
        self.at, self._peers = self.at + edit.taken, []
        self._so_far *= chance
        for number, token in enumerate(edit.inserted):
            self._add(token, _chance(INSIDE) if number else 1.0)

    def _add(self, token: int, chance: float) -> None:
        self.tokens.append(token)
        self.confidence.append(self._so_far * chance)
        self._so_far = 1.0
