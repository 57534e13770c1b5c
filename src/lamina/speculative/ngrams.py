"""Where the last tokens of a text stood before: an index that grows with the text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LEVELS = (2, 4, 8)
"""Lengths of the runs of tokens that are indexed."""
LONGEST = 32
"""A match is measured up to this many tokens."""
STEPS = 16
"""Earlier occurrences looked at for each level: what bounds the time of a proposal."""


class Index:
    """Where the runs of tokens of a text stand. A token is added in constant time.

    A table for each level holds, for each bucket of the hash of the last tokens, the latest position; a chain leads
    from each position to the one before it of the same bucket. All are arrays of 4 bytes: 4 for the token, and for
    each level 4 for the chain and 4 to 8 for the table.
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self._clear(1024)
        self._whole = True  # False where Ctrl-C cut a change short: tables and text are not of one length then

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
        self._whole = False
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
        self._whole = True

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` tokens: the chains are undone from their ends.

        All is forgotten where a change before was cut short.
        """
        if not self._whole:
            self.tokens = array("i")
            self._clear(1024)
        self._whole = False
        for end in range(len(self.tokens), length, -1):
            for level, heads, chain in zip(LEVELS, self._heads, self._chains, strict=True):
                before = chain.pop()
                if end >= level:
                    heads[hash(tuple(self.tokens[end - level : end])) & self._mask] = before
        del self.tokens[length:]
        self._whole = True

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
