"""The lookup draft: what followed the last tokens where they stood before, in the prompt or in the answer itself.

It needs no second model and no memory to speak of: at most 40 bytes a token of text. Where an answer repeats what is
already there (a function with one change, a quotation, a table), it copies long runs; elsewhere it says little, and
its confidence says so. The idea is prompt lookup decoding (Saxena 2023) and LLMA (Yang et al. 2023, arXiv:2304.04487);
what is added here is that a copied place is kept through small edits, and that edits seen once are proposed again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log2
from typing import Any

from lamina.decode.draft import GoOn, Pick, Proposal

LEVELS = (2, 4, 8)
"""Lengths of the runs of tokens that are indexed."""
LONGEST = 32
"""A match is measured up to this many tokens."""
STEPS = 16
"""Earlier occurrences looked at for each level: what bounds the time of a proposal."""
WINDOW = 32
"""Where a copy broke off, its source is looked for again up to this many tokens further on."""
PATIENCE = 96
"""Tokens after which a source that is not found again is forgotten."""
EDIT = (4, 8)
"""An edit that is learnt takes at most so many tokens away and puts at most so many in their place."""

# Weights of the confidence, in log odds. See `Lookup`.
COPY = (-2.0, 0.7, 0.2, 0.5, -0.7, -0.5, -1.0, -1.0)
AGAIN = (0.0, 1.0, -1.0, 0.2)
INSIDE = 3.0
RATE = 0.2
"""How fast the confidence follows how right it was in this text."""


class Index:
    """Where the runs of tokens of a text stand. A token is added in constant time.

    A table for each level holds, for each bucket of the hash of the last tokens, the latest position; a chain leads
    from each position to the one before it of the same bucket. All are arrays of 4 bytes: 4 for the token, and for
    each level 4 for the chain and 4 to 8 for the table.
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self._clear(1024)

    def _clear(self, buckets: int) -> None:
        self._mask = buckets - 1
        self._heads = [array("i", [-1]) * buckets for _ in LEVELS]
        self._chains = [array("i", [-1]) for _ in LEVELS]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes."""
        return sum(len(a) * a.itemsize for a in (self.tokens, *self._heads, *self._chains))

    def extend(self, tokens: Sequence[int]) -> None:
        """More text at the end."""
        begin = len(self.tokens)
        self.tokens.extend(tokens)
        if len(self.tokens) > self._mask + 1:  # twice as many buckets: each token moves once or twice in all
            self._clear(1 << (len(self.tokens) - 1).bit_length())
            begin = 0
        for end in range(begin + 1, len(self.tokens) + 1):
            for level, heads, chain in zip(LEVELS, self._heads, self._chains, strict=True):
                if end < level:
                    chain.append(-1)
                    continue
                bucket = hash(tuple(self.tokens[end - level : end])) & self._mask
                chain.append(heads[bucket])
                heads[bucket] = end

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` tokens: the chains are undone from their ends."""
        for end in range(len(self.tokens), length, -1):
            for level, heads, chain in zip(LEVELS, self._heads, self._chains, strict=True):
                before = chain.pop()
                if end >= level:
                    heads[hash(tuple(self.tokens[end - level : end])) & self._mask] = before
        del self.tokens[length:]

    def same(self, at: int, end: int, most: int = LONGEST) -> int:
        """How many tokens before `at` and before `end` are the same, up to `most`."""
        tokens, length = self.tokens, 0
        most = min(most, at)
        while length < most and tokens[at - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length

    def matches(self) -> list[tuple[int, int]]:
        """Positions at which the last tokens of the text ended before, with the length of the match: longest first,
        then latest. Looks at no more than `STEPS` places a level, and at shorter levels only while there are few."""
        found: dict[int, int] = {}
        end = len(self.tokens)
        for level, chain in zip(reversed(LEVELS), reversed(self._chains), strict=True):
            at = chain[end]
            for _ in range(STEPS):
                if at < 0:
                    break
                if at not in found and (length := self.same(at, end)) >= level:
                    found[at] = length
                at = chain[at]
            if len(found) >= STEPS // 2:
                break
        return sorted(found.items(), key=lambda match: (-match[1], -match[0]))


@dataclass(slots=True)
class Edit:
    """What was put where, and how often that was done and not done."""

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
class Source:
    """A place to copy from.

    Attributes:
        at: its next token.
        length: tokens before it that are the same as those at the end of the text.
        copied: tokens copied from around it so far.
        guess: 0, or which of the guesses that no token supports yet: 1 for a replaced token, 2 for inserted ones.
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
    return 1 / (1 + exp(-max(-20.0, min(20.0, odds))))


def _odds(weights: Sequence[float], features: Sequence[float]) -> float:
    return sum(weight * x for weight, x in zip(weights, features, strict=True))


def copy_features(source: Source, steps: int, agree: float, differ: float) -> tuple[float, ...]:
    """What speaks for a copied token: the length of its match, what was copied before, other places that agree."""
    length = min(source.length + steps, LONGEST)
    return (
        1.0,
        log2(1 + length),
        log2(1 + min(source.copied, 64)),
        log2(1 + agree),
        log2(1 + differ),
        float(length == 1),
        float(source.guess == 1 and steps == 0),
        float(source.guess == 2 and steps == 0),
    )


def edit_features(edit: Edit, source: Source) -> tuple[float, ...]:
    """What speaks for doing an edit again: that it was done, and not left undone, before."""
    return (1.0, log2(1 + edit.done), log2(1 + edit.left), log2(1 + min(source.copied, 64)))


class Lookup:
    """Proposes what followed the last tokens where they stood before."""

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
        known = self._index.tokens
        shared = next((i for i, (old, new) in enumerate(zip(known, prompt, strict=False)) if old != new), None)
        self._index.truncate(min(len(known), len(prompt)) if shared is None else shared)
        self._index.extend(prompt[len(self._index) :])
        self._restart(len(prompt))

    def propose(self, text: list[int], most: int, go_on: GoOn | None = None, pick: Pick | None = None) -> Proposal:
        """What may come next, copied from the likeliest source. Neither `go_on` nor `pick` is used."""
        best = self.continuations(text, 1, most)
        self._judged = Judged(len(text), best[0] if best else Proposal())
        return self._judged.proposal

    def continuations(self, text: list[int], k: int, most: int = 16) -> list[Proposal]:
        """Up to `k` ways to go on, the likeliest first, no two of which begin with the same token."""
        self._read(text)
        sources = self._sources()
        chosen: dict[int, Proposal] = {}
        peers = [(source.at, source.length) for source in sources if source.length]
        ranked = sorted(
            ((self._copy(source, peers, 1), source) for source in sources), key=lambda r: -r[0].confidence[0]
        )
        for first, source in ranked:
            if len(chosen) < k and first.tokens[0] not in chosen:
                chosen[first.tokens[0]] = self._copy(source, peers, most)
        return list(chosen.values())

    # The text comes in.

    def _read(self, text: list[int]) -> None:
        begin = len(self._index)
        self._index.extend(text[begin:])
        self._judge()
        for end in range(begin + 1, len(text) + 1):
            self._follow(end)
        self._settle()

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
                    edit[1].left += 1
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
        """Where the source goes on after an open edit: the position, and how many tokens say so."""
        best = (place.at, 0)
        last = self._answer if place.at < self._answer else place.broke  # a source in the prompt goes on there
        for at in range(place.at + 1, min(place.at + WINDOW, last) + 1):
            length = self._index.same(at, end, min(4, at - place.at, end - place.broke))
            if length > best[1]:
                best = (at, length)
        return best

    def _settle(self) -> None:
        """Takes a place to follow, where there is none or where another one is followed by now."""
        place = self._place
        if place is not None and place.broke < 0:
            return
        matches = self._index.matches()
        if matches and matches[0][1] >= (4 if place is None else 8):
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
        self._edits[key] = Edit(inserted, left=left)

    def _edit(self, before: int, at: int) -> tuple[int, Edit] | None:
        """The edit done before to what stands at `at`, or after the token `before`: how much it takes away, and it."""
        if self._edits:
            known = self._index.tokens
            for taken in range(min(EDIT[0], len(known) - at), 0, -1):
                if edit := self._edits.get(tuple(known[at : at + taken])):
                    return taken, edit
            if edit := self._edits.get((-1, before)):
                return 0, edit
        return None

    # How likely it is.

    def _copy_chance(self, source: Source, steps: int, agree: float, differ: float) -> float:
        """The chance of the token `steps` after the first that is copied from `source`."""
        return _chance(self._bias + _odds(COPY, copy_features(source, steps, agree, differ)))

    def _edit_chance(self, edit: Edit, source: Source) -> float:
        """The chance that an edit is done again."""
        return _chance(self._bias + _odds(AGAIN, edit_features(edit, source)))

    # What may come next.

    def _sources(self) -> list[Source]:
        known, end, place = self._index.tokens, len(self._index), self._place
        sources = {at: Source(at, length) for at, length in self._index.matches()}
        if place is not None and place.broke < 0:
            sources[place.at] = Source(place.at, self._index.same(place.at, end), place.copied)
        elif place is not None:
            at, length = self._again(place, end)
            if length:
                sources[at] = Source(at, self._index.same(at, end), place.copied)
            instead = min(place.at + end - place.broke, end - 1)
            if (found := self._edit(known[place.at - 1], place.at)) and known[place.broke :] == array(
                "i", found[1].inserted
            ):
                sources[place.at + found[0]] = Source(place.at + found[0], 2, place.copied)
            sources.setdefault(instead, Source(instead, 0, place.copied, 1))
            sources.setdefault(place.at, Source(place.at, 0, place.copied, 2))
        return list(sources.values())

    def _copy(self, source: Source, peers: list[tuple[int, int]], most: int) -> Proposal:
        """The tokens from `source` on, known edits done again, with the chance of each."""
        known, end, at, proposal = self._index.tokens, len(self._index), source.at, Proposal()
        tokens, confidence = proposal.tokens, proposal.confidence

        def token_at(position: int) -> int:
            return known[position] if position < end else tokens[position - end]

        peers = [peer for peer in peers if peer[0] != source.at]
        edited = source.at if source.guess == 2 else -1
        while len(tokens) < most and at < end + len(tokens):
            found = self._edit(token_at(at - 1), at) if source.copied and at != edited and at else None
            if found and (sure := self._edit_chance(found[1], source)) > 0.5:
                tokens.extend(found[1].inserted)
                confidence.extend([sure] + [_chance(INSIDE)] * (len(found[1].inserted) - 1))
                at, edited, peers = at + found[0], at + found[0], []
                continue
            token, steps = token_at(at), len(tokens)
            weight = [0.0, 0.0]
            agreeing = []
            for peer, length in peers:
                agrees = token_at(peer + steps) == token
                weight[agrees] += length / max(source.length, length)
                if agrees:
                    agreeing.append((peer, length))
            peers = agreeing
            confidence.append(self._copy_chance(source, steps, weight[1], weight[0]))
            tokens.append(token)
            at += 1
        del tokens[most:], confidence[most:]
        return proposal
