"""From a hub id and the name of a GGUF file to the file: it alone, with all its parts, and once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_files import write_model
from lamina import AutoModel
from lamina.checkpoint.hub_gguf import locate_gguf
from lamina.errors import MissingShardError, RequestError, UnsupportedError
from lamina.model.auto import plan_model
from unit.fake_hub import FakeHub, connected

PARTS = {f"big-0000{number}-of-00002.gguf": bytes(100 * number) for number in (1, 2)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_the_file_alone_is_fetched_and_once(hub: FakeHub) -> None:
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


def test_all_parts_are_fetched_by_the_name_of_any(hub: FakeHub) -> None:
    hub.add("me/m", {f"q4/{name}": data for name, data in PARTS.items()})
    path = Path(locate_gguf("me/m", "big-00002-of-00002.gguf", subfolder="q4"))
    assert path.name == "big-00001-of-00002.gguf"
    assert {each.name for each in path.parent.iterdir()} == set(PARTS)


def test_what_is_not_there_is_named(hub: FakeHub) -> None:
    hub.add("me/m", {"a.gguf": b"GGUF1", "big-00001-of-00002.gguf": b"x"})
    with pytest.raises(RequestError, match=r"me/m has no file 'c\.gguf': it has a\.gguf, big-00001-of-00002\.gguf"):
        locate_gguf("me/m", "c.gguf")
    with pytest.raises(MissingShardError, match=r"needs big-00002-of-00002\.gguf, which the repository does not have"):
        locate_gguf("me/m", "big-00001-of-00002.gguf")
    with pytest.raises(MissingShardError, match=r"a\.gguf of me/m is not in the cache"):
        locate_gguf("me/m", "a.gguf", local_files_only=True)


def test_a_model_of_the_hub_runs(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("me/m", {"model.gguf": write_model(tmp_path, "llama").read_bytes()})
    with pytest.raises(UnsupportedError, match=r"download model\.gguf of me/m first"):
        plan_model("me/m", gguf_file="model.gguf")
    with AutoModel.from_pretrained("me/m", gguf_file="model.gguf", memory="3GB", device="cpu").lamina as lamina:
        assert lamina.model.config.model_type == "llama"
        assert lamina.model.tokenizer.eos_token_id == 2
