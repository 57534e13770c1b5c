"""The points of observation: what a listener hears, and that nobody hears anything before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lamina.stream.observe import LAMINA, WAIT, listen, timed


@dataclass
class Heard:
    spans: list[tuple[str, str]] = field(default_factory=list)

    def span(self, kind: str, name: str, begin: int, end: int) -> None:
        assert begin <= end
        self.spans.append((kind, name))

    def ring(self, taken: int, full: bool) -> None: ...


@dataclass
class Unit:
    module: str


class Works:
    @timed(WAIT)
    def _wait(self, ticket: object) -> str:
        """Waits."""
        return f"waited for {ticket}"

    @timed(LAMINA)
    def acquire(self, unit: Unit, fail: bool = False) -> None:
        self._wait(1)
        if fail:
            raise RuntimeError("on purpose")

    @timed(LAMINA, "hook layers.0")
    def hook(self, *_: object) -> None: ...


def test_a_point_gives_what_the_method_gives_and_is_told_only_to_who_listens() -> None:
    works, heard = Works(), Heard()
    assert works._wait("t") == "waited for t"
    assert works._wait.__doc__ == "Waits."
    assert heard.spans == []
    end = listen(heard)
    assert works._wait("t") == "waited for t"
    works.hook(Unit("other"))
    end()
    works._wait("t")
    assert heard.spans == [(WAIT, "wait t"), (LAMINA, "hook layers.0")]


def test_calls_are_told_inner_ones_first_and_after_an_error_too() -> None:
    works, heard = Works(), Heard()
    end = listen(heard)
    with pytest.raises(RuntimeError, match="on purpose"):
        works.acquire(Unit("layers.0"), fail=True)
    end()
    assert heard.spans == [(WAIT, "wait"), (LAMINA, "acquire layers.0")]


def test_the_listener_before_hears_again_when_one_ends() -> None:
    works, outer, inner = Works(), Heard(), Heard()
    end_outer = listen(outer)
    end_inner = listen(inner)
    works.hook()
    end_inner()
    works.hook()
    end_outer()
    assert (len(inner.spans), len(outer.spans)) == (1, 1)
