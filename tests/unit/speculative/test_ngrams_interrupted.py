"""An index that Ctrl-C cut short in a change: the next text is indexed as if nothing had been."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest

from lamina.speculative import ngrams
from lamina.speculative.prompt_lookup import Lookup


def interrupted(call: Any, line: int) -> bool:
    """Run `call` until so many lines of the index's file were run; whether it was cut short there."""
    left = line

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != ngrams.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return watch

    sys.settrace(watch)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("line", [*range(40), 100, 250, 600])
def test_an_interrupt_anywhere_leaves_nothing_behind(line: int) -> None:
    rng = random.Random(line)
    first, second, third = ([rng.randrange(4) for _ in range(length)] for length in (40, 60, 50))
    draft, fresh = Lookup(), Lookup()
    draft.begin(first)
    assert interrupted(lambda: draft.begin(second), line)
    draft.begin(third)
    fresh.begin(third)
    assert draft._index.tokens == fresh._index.tokens
    assert draft._index.matches() == fresh._index.matches()
    assert draft.propose(third, 8).tokens == fresh.propose(third, 8).tokens
