"""From a hub id and the name of a GGUF file to the file: it alone, with all its parts, and once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.fake_hub import FakeHub, connected
from lamina.checkpoint.choose import split_name
from lamina.errors import MissingShardError, RequestError
from lamina.hub.download import locate_gguf

PARTS = {f"big-0000{number}-of-00002.gguf": bytes(100 * number) for number in (1, 2)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_the_file_alone_is_fetched_and_once(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("me/m", {"a.gguf": b"GGUF1", "b.gguf": b"GGUF2", "config.json": b"{}"})
    steps: list[tuple[str, int, int]] = []
    path = locate_gguf("me/m", "b.gguf", progress=lambda *step: steps.append(step))
    assert Path(path).read_bytes() == b"GGUF2"
    assert steps[-1] == ("download", 5, 5)
    assert sum("b.gguf" in each for each in hub.fetched()) == 1
    assert not any("a.gguf" in each for each in hub.fetched())
    assert locate_gguf("me/m", "b.gguf") == path
    assert sum("b.gguf" in each for each in hub.fetched()) == 1
    assert locate_gguf("me/m", "b.gguf", local_files_only=True) == path
    assert not caplog.records  # huggingface_hub would say that no files matched


def test_all_parts_are_fetched_by_the_name_of_any(hub: FakeHub) -> None:
    hub.add("me/m", {f"q4/{name}": data for name, data in PARTS.items()})
    path = Path(locate_gguf("me/m", "big-00002-of-00002.gguf", subfolder="q4"))
    assert path.name == "big-00001-of-00002.gguf"
    assert {each.name for each in path.parent.iterdir()} == set(PARTS)


def test_what_is_not_there_is_named(hub: FakeHub) -> None:
    hub.add("me/m", {"a.gguf": b"GGUF1", "big-00001-of-00002.gguf": b"x"})
    with pytest.raises(RequestError, match=r"me/m has no file 'c\.gguf': name one, as in 'me/m:a\.gguf'; it al"):
        locate_gguf("me/m", "c.gguf")
    with pytest.raises(RequestError, match=r"me/m has no GGUF file for 'Q4_K_M': name one"):
        locate_gguf("me/m", "Q4_K_M")
    with pytest.raises(MissingShardError, match=r"needs big-00002-of-00002\.gguf, which the repository does not have"):
        locate_gguf("me/m", "big-00001-of-00002.gguf")
    with pytest.raises(MissingShardError, match=r"a\.gguf of me/m is not in the cache"):
        locate_gguf("me/m", "a.gguf", local_files_only=True)


def test_one_is_named_by_its_kind(hub: FakeHub) -> None:
    names = [
        "m-Q4_K_M.gguf",
        "m-IQ4_K_M.gguf",
        "Q4_K_M_L/m-Q4_K_M_L-00001-of-00001.gguf",
        "m.Q8_0.gguf",
        "mmproj-F16.gguf",
    ]
    hub.add("me/m", {name: name.encode() for name in names})
    for choice, name in (("Q4_K_M", names[0]), ("q8_0", names[3]), ("Q4_K_M_L", names[2])):
        assert Path(locate_gguf("me/m", choice)).read_bytes() == name.encode()
        assert Path(locate_gguf("me/m", choice, local_files_only=True)).read_bytes() == name.encode()
    assert locate_gguf("me/m", "m-Q4_K_M_L-00001-of-00001.gguf").endswith(names[2])
    hub.add("me/two", {"a-Q8_0.gguf": b"", "b-Q8_0.gguf": b""})
    with pytest.raises(RequestError, match=r"2 GGUF models for 'Q8_0': name one, as in 'me/two:a-Q8_0\.gguf'"):
        locate_gguf("me/two", "Q8_0")


@pytest.mark.parametrize(
    ("name", "model", "choice"),
    [
        ("org/m:a.gguf", "org/m", "a.gguf"),
        ("org/m:q4/a-00001-of-00002.gguf", "org/m", "q4/a-00001-of-00002.gguf"),
        ("org/m-GGUF:Q4_K_M", "org/m-GGUF", "Q4_K_M"),
        ("./folder:UD-Q4_K_XL", "./folder", "UD-Q4_K_XL"),
        ("C:\\models\\a.gguf", "C:\\models\\a.gguf", None),
        ("C:a.gguf", "C:a.gguf", None),
        ("https://huggingface.co/org/m", "https://huggingface.co/org/m", None),
        ("https://huggingface.co/org/m.gguf", "https://huggingface.co/org/m.gguf", None),
        ("org/m", "org/m", None),
        ("org/m:", "org/m:", None),
        (":Q4", ":Q4", None),
    ],
)
def test_a_name_is_taken_apart_at_its_colon(name: str, model: str, choice: str | None) -> None:
    assert split_name(name) == (model, choice)


def test_what_exists_is_a_path_whatever_its_colons(tmp_path: Path) -> None:
    (tmp_path / "m:Q4").mkdir()
    (tmp_path / "m:a.gguf").touch()
    for name in ("m:Q4", "m:a.gguf"):
        assert split_name(tmp_path / name) == (str(tmp_path / name), None)


def test_a_cache_without_any_says_so(hub: FakeHub) -> None:
    hub.add("me/m", {"a.gguf": b""})
    for choice in ("a.gguf", "Q8_0"):
        with pytest.raises(MissingShardError, match=rf"{choice} of me/m is not in the cache, and this run may not use"):
            locate_gguf("me/m", choice, local_files_only=True)
    locate_gguf("me/m", "a.gguf")
    with pytest.raises(
        MissingShardError, match=r"in the cache, me/m has no file 'b\.gguf': .*; and this run may not use"
    ):
        locate_gguf("me/m", "b.gguf", local_files_only=True)
