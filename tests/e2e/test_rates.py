"""What the forecast's rates are measured with: which weights, which bytes of them, and what they leave behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lamina
from helpers.tiny import write_llama
from lamina.checkpoint import open_checkpoint
from lamina.checkpoint.extent import Extent
from lamina.codec import AFFINE
from lamina.plan.forecast import Hardware
from lamina.runtime import rates
from lamina.store import split
from lamina.stream.probe import drive_rate
from lamina.stream.readers import Readers

LAYERS = 2
CPU = torch.device("cpu")


def _bound(model: Any, name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module)._parameters[attribute]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, vocab_size=128, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("stores") / "tiny-4bit"
    split(str(folder), to=str(found), compression="4bit")
    return found


def test_a_model_is_loaded_with_rates_and_its_own_count_of_bytes_alone(folder: Path) -> None:
    with lamina.AutoModel.from_pretrained(str(folder), memory="2GB").lamina as handle:
        hardware, resident = handle.plan.hardware, handle.plan.resident_bytes
        assert handle.stats.bytes_read < 1.2 * resident, "what was read to measure is not the model's"
        counted = handle._engine.weights.schedule.operations
        assert counted > 2 * LAYERS * len("qkvo"), "the trace counts what a pass calls"
        assert handle.plan.work.operations > counted
    default = Hardware()
    assert hardware.memory_bytes_per_second != default.memory_bytes_per_second
    assert hardware.operation_seconds != default.operation_seconds
    assert hardware.reading_cost > 0
    assert hardware.decoding_bytes_per_second == default.decoding_bytes_per_second, "nothing is unpacked"
    assert hardware.disk_bytes_per_second == default.disk_bytes_per_second, "nothing streams"


def test_products_are_made_with_the_weights_own_bytes(folder: Path, store: Path) -> None:
    plain = load_file(folder / "model.safetensors")
    for where, codec in ((folder, rates.PLAIN), (store, "q4")):
        model = lamina.AutoModel.from_pretrained(str(where), memory="2GB")
        with model.lamina as handle:
            engine = handle._engine
            weights = rates._by_codec(engine.weights.schedule)[codec]
            assert "model.embed_tokens.weight" not in {weight.name for weight in weights}, "it is only looked up"
            readers = Readers()
            try:
                found = list(rates._read(engine, readers, weights, 1 << 20))
            finally:
                readers.close()
            assert len(found) == len(weights), "room for all of them"
            for weight, matrix in zip(weights, found, strict=True):
                rows = matrix.shape[0]
                own = plain.get(weight.name)
                if own is not None:
                    wanted = own if codec == rates.PLAIN else _bound(model, weight.name).unpack()
                    held = matrix.unpack() if hasattr(matrix, "unpack") else matrix
                    assert torch.equal(held, wanted[:rows])


@pytest.mark.parametrize("kept", ["store", "folder"])
def test_turns_time_what_is_resident(
    kept: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter([9.0] + [0.5] * 1000)  # the first turn starts threads
    with lamina.AutoModel.from_pretrained(str(request.getfixturevalue(kept)), memory="2GB").lamina as handle:
        hardware, engine = handle.plan.hardware, handle._engine
        none = rates.Turns(engine)
        none.take()
        assert none.applied(hardware) == hardware, "so few bytes would lie in a cache: the rates of loading stay"
        monkeypatch.setattr(rates, "SAMPLE", 1 << 12)
        turns = rates.Turns(engine)
        codec = "q4" if kept == "store" else rates.PLAIN
        (matrix, *_) = turns._matrices[codec]
        assert any(matrix is _bound(handle.model, name) for name in handle.plan.resident), "not a copy"
        turns._matrices = {codec: [matrix]}
        monkeypatch.setattr(rates, "_product", lambda row, matrix: next(took))
        for _ in range(3):
            turns.take()
        rate = matrix.numel() * matrix.dtype.itemsize / 0.5
        field = "decoding_bytes_per_second" if kept == "store" else "memory_bytes_per_second"
        assert turns.applied(hardware) == dataclasses.replace(hardware, **{field: pytest.approx(rate)})


def test_what_is_timed_is_chosen_by_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One large matrix among many small ones has most of the bytes, and so decides the rate."""
    with lamina.AutoModel.from_pretrained(str(folder), memory="2GB").lamina as handle:
        engine = handle._engine
        weights = sorted(rates._by_codec(engine.weights.schedule)[rates.PLAIN], key=lambda weight: weight.nbytes)
        large, total = weights[-1], sum(weight.nbytes for weight in weights)
        for order in (weights, weights[::-1]):
            for sample in (2 * large.nbytes, total // 2, total):
                monkeypatch.setattr(rates, "SAMPLE", sample)
                chosen = rates._some(engine, order)
                assert abs(rates._nbytes(chosen) - min(sample, total)) <= large.nbytes
            assert len(chosen) == len(weights)
        small = [dataclasses.replace(large, name=weight.name, shape=(1, 1)) for weight in weights[:-1]]
        monkeypatch.setattr(rates, "SAMPLE", large.nbytes * 3 // 4)
        assert any(matrix is engine.sites.bound(large.name) for matrix in rates._some(engine, [*small, large]))


def test_a_store_s_unpacking_is_measured(store: Path) -> None:
    with lamina.AutoModel.from_pretrained(str(store), memory="2GB").lamina as handle:
        assert handle.plan.hardware.decoding_bytes_per_second != Hardware().decoding_bytes_per_second


def test_codecs_are_weighed_by_what_a_token_needs(store: Path) -> None:
    with lamina.AutoModel.from_pretrained(str(store), memory="2GB").lamina as handle:
        schedule = handle._engine.weights.schedule
    head = schedule.weights["lm_head.weight"]
    other = dataclasses.replace(head, segments=(dataclasses.replace(head.segments[0], codec="q8"),))
    schedule = dataclasses.replace(schedule, weights={**schedule.weights, head.name: other})
    kinds = rates._by_codec(schedule)
    assert set(kinds) == {"q4", "q8"} and kinds["q8"] == [other]
    alike = rates._unpacking(schedule, dict.fromkeys(kinds, 3e9))
    assert alike == pytest.approx(3e9)
    four, eight = (sum(weight.unpacked_nbytes for weight in kinds[name]) for name in ("q4", "q8"))
    assert rates._unpacking(schedule, {"q4": 1e9, "q8": 2e9}) == pytest.approx(
        (four + eight) / (four / 1e9 + eight / 2e9)
    )
    assert rates._unpacking(schedule, {}) is None


def test_a_plan_of_what_is_here_and_of_what_is_not_written_has_rates(folder: Path) -> None:
    here = lamina.plan_model(str(folder), memory="2GB").hardware
    assert here.memory_bytes_per_second != Hardware().memory_bytes_per_second
    meant = lamina.plan_model(str(folder), memory="2GB", compression="8bit").hardware
    assert meant.decoding_bytes_per_second != Hardware().decoding_bytes_per_second


def test_what_lies_on_the_hub_is_not_read(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    there = {
        name: dataclasses.replace(entry, extent=Extent("hf://a/b/c", entry.extent.offset, entry.extent.length))
        for name, entry in checkpoint.tensors.items()
    }
    assert drive_rate(dataclasses.replace(checkpoint, tensors=there), 1.0, 1 << 20) is None
    assert drive_rate(checkpoint, 1.0, 1 << 20) is not None


@pytest.mark.parametrize("codec", ["", "q4", "q8", "bf16z"])
def test_made_up_weights_are_stored_as_those_they_stand_for(codec: str, store: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rates, "SAMPLE", 1 << 20)
    monkeypatch.setattr(rates, "LARGEST_PART", 1 << 18)
    monkeypatch.setattr(rates, "MADE_UP", 1 << 14)
    with lamina.AutoModel.from_pretrained(str(store), memory="2GB").lamina as handle:
        weight = rates._by_codec(handle._engine.weights.schedule)["q4"][0]
    if codec:
        panel_rows = 32 if codec == "bf16z" else 1
        segment = dataclasses.replace(weight.segments[0], codec=codec, panel_rows=panel_rows)
        weight = dataclasses.replace(weight, segments=(segment,))
    else:
        weight = dataclasses.replace(weight, convert=rates.Convert.NONE, segments=())
    made = rates._made_up(weight, CPU)
    assert made is not None and len(made) > 1
    assert all(matrix.shape[-1] == weight.shape[-1] and matrix.dtype is torch.bfloat16 for matrix in made)
    if codec:
        assert {span.codec for matrix in made for span in matrix.spans} == {codec}
    assert rates._rate(made) > 0


def test_a_codec_that_nobody_can_write_is_left_out(store: Path) -> None:
    with lamina.AutoModel.from_pretrained(str(store), memory="2GB").lamina as handle:
        weight = rates._by_codec(handle._engine.weights.schedule)["q4"][0]
    odd = dataclasses.replace(weight, segments=(dataclasses.replace(weight.segments[0], codec="gguf-odd"),))
    assert "gguf-odd" not in AFFINE and rates._made_up(odd, CPU) is None
