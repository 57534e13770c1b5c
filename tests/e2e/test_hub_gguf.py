"""A GGUF file out of a hub repository, or out of a folder of several: planned, loaded and run by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.fake_hub import FakeHub, connected
from helpers.gguf_files import write_model
from lamina import AutoModel
from lamina.api import plan_model
from lamina.errors import RequestError, UnsupportedError
from lamina.hub import repository
from lamina.hub.download import locate_gguf
from lamina.store import split


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("plan", [True, False])
def test_a_repository_of_gguf_alone_lists_what_it_has(hub: FakeHub, plan: bool) -> None:
    hub.add("me/m", {"a-Q8_0.gguf": b"1", "q/b-Q4_K_M.gguf": b"2", "mmproj-F16.gguf": b"", "README.md": b""})
    line = r"me/m holds 2 GGUF models and no other weights: name one, as in 'me/m:q/b-Q4_K_M\.gguf'; it al"
    with pytest.raises(UnsupportedError, match=line):
        plan_model("me/m") if plan else AutoModel.from_pretrained("me/m", memory="3GB")
    assert not any(name.endswith(".gguf") for name in hub.fetched())
    locate_gguf("me/m", "Q8_0")
    with pytest.raises(UnsupportedError, match=r"'me/m:a-Q8_0\.gguf'"):
        plan_model("me/m", local_files_only=True) if plan else AutoModel.from_pretrained("me/m", local_files_only=True)


@pytest.mark.parametrize("outlines", [(1000, 3000, 1 << 20), (1 << 20,)])
def test_a_model_of_the_hub_runs(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outlines: tuple[int, ...]
) -> None:
    monkeypatch.setattr(repository, "_OUTLINES", outlines)
    hub.add("me/m", {"model-F16.gguf": write_model(tmp_path, "llama").read_bytes()})
    planned = [plan_model(name) for name in ("me/m:model-F16.gguf", "me/m:F16")]
    assert not [*(tmp_path / "cache").rglob("*.gguf")]
    for name, options in (("me/m", {"gguf_file": "model-F16.gguf"}), ("me/m:f16", {})):
        model = AutoModel.from_pretrained(name, memory="3GB", device="cpu", **options)
        with model.lamina as lamina:
            assert lamina.model.config.model_type == "llama"
            assert lamina.model.tokenizer.eos_token_id == 2
    here = plan_model("me/m:F16")  # from the cache
    for there in planned:
        assert (there.model_bytes, there.minimum_memory_bytes) == (here.model_bytes, here.minimum_memory_bytes)
    with pytest.raises(RequestError, match=r"two GGUF files: give one"):
        plan_model("me/m:F16", gguf_file="other.gguf")


def test_one_of_a_folder_runs(tmp_path: Path) -> None:
    for kind in ("Q8_0", "F16"):
        write_model(tmp_path / kind, "llama").rename(tmp_path / f"m-{kind}.gguf")
    with pytest.raises(UnsupportedError, match=rf"{tmp_path} holds 2 GGUF models .*'{tmp_path}:m-F16\.gguf'"):
        plan_model(str(tmp_path))
    for name in ("F16", "m-F16.gguf"):
        assert plan_model(f"{tmp_path}:{name}").model_bytes == plan_model(str(tmp_path / "m-F16.gguf")).model_bytes
    assert plan_model(f"{tmp_path}:F16", draft=f"{tmp_path}:Q8_0").draft == f"{tmp_path}:Q8_0"
    assert "made of a GGUF file" in plan_model(f"{tmp_path}:F16").draft_reason
    with pytest.raises(UnsupportedError, match="no copy in 4 bits is made of a GGUF file"):
        plan_model(f"{tmp_path}:F16", draft="self")
    with pytest.raises(RequestError, match="has no GGUF file for 'Q2_K': name one"):
        plan_model(f"{tmp_path}:Q2_K")
    for call in (split, AutoModel.from_pretrained):
        with pytest.raises(UnsupportedError, match=r"F16 of .* is small already and streams as it is"):
            call(f"{tmp_path}:F16", compression="4bit")
    with pytest.raises(UnsupportedError, match=r"m-F16\.gguf of .* is small already and streams as it is"):
        split(str(tmp_path), gguf_file="m-F16.gguf")
