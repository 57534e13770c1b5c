"""A model by its hub id, from the plan out of headers alone to generated tokens, over a hub on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.fake_hub import FakeHub, connected
from helpers.families import input_ids, write_tiny
from lamina import AutoModel, ModelNotFoundError, plan_model

MODEL = "someone/tiny-llama"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "origin"
    write_tiny("llama", folder, max_shard_size="100KB")
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        hub.add(MODEL, {path.name: path.read_bytes() for path in folder.iterdir()})
        yield hub


def test_a_plan_fetches_headers_and_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    plan = plan_model(MODEL, device="cpu", context=64)
    weights = sum(path.stat().st_size for path in (tmp_path / "origin").glob("*.safetensors"))
    asked = [each for each in hub.served if each.path.endswith(".safetensors") and each.method == "GET"]
    assert plan.model_bytes < weights < plan.model_bytes * 1.1
    assert asked and all(each.range is not None for each in asked)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_plan_of_headers_is_the_plan_of_the_files(hub: FakeHub, tmp_path: Path) -> None:
    from_hub = plan_model(MODEL, device="cpu", context=64).as_dict()
    from_files = plan_model(str(tmp_path / "origin"), device="cpu", context=64).as_dict()
    same = ("model_bytes", "resident_bytes", "minimum_memory_bytes", "parameters", "units")
    assert {key: from_hub[key] for key in same} == {key: from_files[key] for key in same}


def test_the_model_of_the_hub_is_the_model_of_the_folder(hub: FakeHub, tmp_path: Path) -> None:
    least = plan_model(MODEL, device="cpu", context=64).minimum_memory_bytes
    model = AutoModel.from_pretrained(MODEL, memory=least, device="cpu", context=64)
    local = AutoModel.from_pretrained(str(tmp_path / "origin"), device="cpu", context=64)
    ids = input_ids(model.config)
    with torch.no_grad(), model.lamina, local.lamina:
        assert model.lamina.plan.streams
        assert torch.equal(model(ids).logits, local(ids).logits)


def test_a_model_that_the_hub_does_not_have(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="someone/nothing"):
        AutoModel.from_pretrained("someone/nothing", device="cpu")
