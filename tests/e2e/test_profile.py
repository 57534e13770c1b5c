"""Where the time goes: the arithmetic on spans, and what is recorded of real models."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.families import write_tiny
from helpers.judge import minimum_of, steady, streamed_model
from lamina import AutoModel
from lamina.codec import AFFINE
from lamina.errors import LaminaError, RequestError, WriteError
from lamina.measure import profile
from lamina.measure.bench import bench_model
from lamina.measure.profile import Recording, profile_model
from lamina.measure.timeline import (
    BETWEEN,
    COMPUTE,
    COPY,
    LAMINA,
    LAYER,
    MODEL,
    OP,
    PASS,
    THROUGH,
    UNPACK,
    WAIT,
    ReadSpan,
    Span,
    by_call,
    chrome_trace,
    drive_of,
    nested,
    owners,
)
from lamina.measure.trace_file import BEGIN, check_trace_file, write_trace
from lamina.plan.schedule import PanelSpan
from lamina.store import split
from lamina.tensors.packed import PackedTensor, Scratch

PROMPT = [1, 2, 3, 4]


def spans(*told: tuple[str, int, int]) -> list[Span]:
    return [Span(kind, kind, begin, end) for kind, begin, end in told]


def properly_nested(slices: list[tuple[int, int]]) -> bool:
    """Whether no two overlap in part."""
    return not any(a < c < b < d or c < a < d < b for (a, b), (c, d) in itertools.combinations(slices, 2))


# -- the arithmetic


def test_each_moment_belongs_to_the_innermost() -> None:
    recorded = spans((PASS, 10, 90), (LAYER, 20, 80), (LAMINA, 22, 40), (WAIT, 25, 35), (OP, 26, 30), (OP, 50, 60),
                     (OP, 52, 55))  # fmt: skip
    found = owners(nested(recorded), 0, 100)
    assert found == Counter({BETWEEN: 20, MODEL: 10 + 10 + 2 + 30, LAMINA: 8, WAIT: 10, COMPUTE: 10})


def test_torch_inside_of_what_lamina_calls_through_is_computing() -> None:
    found = owners(
        nested(spans((PASS, 0, 100), (THROUGH, 10, 60), (UNPACK, 20, 30), (OP, 30, 50), (COPY, 70, 80))), 0, 100
    )
    assert found == Counter({MODEL: 40, THROUGH: 20, UNPACK: 10, COMPUTE: 20, COPY: 10, BETWEEN: 0})


def test_lamina_s_python_is_told_by_call() -> None:
    told = [Span(LAMINA, "acquire a", 0, 100), Span(LAMINA, "pump", 10, 30), Span(WAIT, "wait", 40, 90),
            Span(LAMINA, "acquire b", 110, 120), Span(LAMINA, "pump", 115, 117)]  # fmt: skip
    assert by_call(nested(told)) == Counter({"acquire": 30 + 8, "pump": 20 + 2})


def test_what_torch_computes_between_passes_is_between_passes() -> None:
    assert owners(nested(spans((OP, 10, 20), (PASS, 30, 40))), 0, 50) == Counter({BETWEEN: 40, MODEL: 10})


def test_any_spans_add_up_and_nest() -> None:
    torch.manual_seed(3)
    kinds = (PASS, LAYER, LAMINA, WAIT, OP, THROUGH, UNPACK)
    for _ in range(200):
        ends = torch.randint(0, 60, (12, 2)).sort(-1).values.tolist()
        told = [Span(kinds[number % len(kinds)], "", begin, end) for number, (begin, end) in enumerate(ends)]
        found = nested(told)
        assert len(found) == len(told)
        assert all(0 <= span.begin <= span.end <= 60 for span in found)
        assert [span.begin for span in found] == sorted(span.begin for span in found)
        assert properly_nested([(span.begin, span.end) for span in found if span.begin < span.end])
        assert sum(owners(found, 0, 60).values()) == 60


def test_the_smaller_part_of_a_span_on_the_edge_is_cut_off() -> None:
    late, early = nested(spans((LAMINA, 0, 100), (OP, 90, 105))), nested(spans((LAMINA, 0, 100), (OP, 99, 150)))
    assert [(span.begin, span.end) for span in late] == [(0, 100), (90, 100)]
    assert [(span.begin, span.end) for span in early] == [(0, 100), (100, 150)]


def test_the_drive_is_busy_while_at_least_one_read_is_under_way() -> None:
    reads = [
        ReadSpan("a", "f", 0, 100, 0, 40),
        ReadSpan("b", "f", 100, 100, 20, 60),
        ReadSpan("a", "f", 200, 80, 90, 110),
    ]
    drive = drive_of(reads, [(50, 80)], [(10, 100)])
    assert drive.wall == 90
    assert drive.busy == 50 + 10
    assert drive.in_flight == 30 + 40 + 10
    assert drive.full == 20, "while a read is under way the drive is not idle, however full the ring"
    assert drive.nbytes == pytest.approx(75 + 100 + 40)


def test_short_operations_are_left_out_of_a_long_trace() -> None:
    told = spans((PASS, 0, 10_000_000), *((OP, at, at + 900) for at in range(0, 100_000, 1000)), (OP, 200_000, 260_000))
    whole, short = chrome_trace("t", told, [], []), chrome_trace("t", told, [], [], most_events=50)
    assert (whole.dropped, whole.dropped_below) == (0, 0)
    assert (short.dropped, short.dropped_below) == (100, 1000)
    kept = [event["cat"] for event in short.record["traceEvents"] if event["ph"] == "X"]
    assert kept == [PASS, OP]


# -- the file


def test_a_trace_replaces_a_trace_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    record = chrome_trace("t", spans((PASS, 0, 5)), [], []).record
    for _ in range(2):
        assert write_trace(check_trace_file(file), record) == file.stat().st_size
        assert file.read_bytes().startswith(BEGIN)
        assert json.loads(file.read_text()) == record
    assert list(tmp_path.iterdir()) == [file]
    other = tmp_path / "notes.json"
    other.write_text("{}")
    with pytest.raises(RequestError, match=r"notes\.json exists and is no trace"):
        check_trace_file(other)
    with pytest.raises(RequestError, match="is a folder"):
        check_trace_file(tmp_path)
    assert other.read_text() == "{}"


def test_a_place_that_cannot_be_written_is_known_before_the_model_is_loaded(tmp_path: Path) -> None:
    def load(*_: Any, **__: Any) -> PreTrainedModel:
        raise AssertionError("loaded")

    with pytest.raises(WriteError, match=r"cannot write the trace .*no-folder"):
        bench_model("m", profile=True, trace=tmp_path / "no-folder" / "t.json", load=load)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamina.measure.trace_file.os.fsync", full)
    with pytest.raises(WriteError, match="No space left on device") as told:
        write_trace(tmp_path / "t.json", {})
    assert isinstance(told.value, LaminaError) and "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


# -- real models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        write_tiny(family, base / family, dtype=torch.bfloat16)
    split(str(base / "llama"), to=str(base / "4bit"), compression="4bit")
    return {name: base / name for name in ("llama", "mixtral", "4bit")}


@pytest.fixture(params=["llama", "mixtral", "4bit", "resident"])
def named(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[str, PreTrainedModel]]:
    with steady():
        folder = folders.get(request.param, folders["llama"])
        memory = 4 << 30 if request.param == "resident" else minimum_of(folder)
        loaded = streamed_model(folder, memory)
        with loaded.lamina:
            yield request.param, loaded


@pytest.fixture
def model(folders: dict[str, Path]) -> Iterator[PreTrainedModel]:
    with steady():
        loaded = streamed_model(folders["llama"], minimum_of(folders["llama"]))
        with loaded.lamina:
            yield loaded


def test_the_split_adds_up_to_the_wall_time(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    figures, _ = profile_model(model, PROMPT, "t")
    seconds, step = figures["seconds"], figures["seconds_per_step"]
    assert figures["steps"] == profile.STEPS
    assert sum(seconds.values()) == pytest.approx(step, rel=1e-6)
    assert sum(figures["shares"].values()) == pytest.approx(1)
    if name != "4bit":  # there what Lamina calls through has its share as well
        assert sum(figures["lamina_python_by_call"].values()) == pytest.approx(seconds["lamina_python"])
    assert figures["pass_seconds"] == pytest.approx(step - seconds["between_passes"])
    assert figures["python_seconds_per_pass"] == pytest.approx(seconds["lamina_python"] + seconds["model_python"])
    assert all(value >= 0 for value in seconds.values())
    for part in ("computing", "model_python", "lamina_python", "between_passes"):
        assert seconds[part] > 0, part
    assert (seconds["decoding"] > 0) == (name == "4bit")
    assert (figures["disk"]["bytes_per_step"] > 0) == (name != "resident")
    assert (seconds["waiting_for_disk"] > 0) <= (name != "resident")


def test_a_step_reads_what_the_plan_says(model: PreTrainedModel) -> None:
    """All steps together: each for itself may read a little more or less ahead."""
    recording = Recording(model)
    ids = torch.tensor([PROMPT])
    model.lamina._engine.readers.settle()
    recording.start()
    before = model.lamina.stats.bytes_read
    for _ in range(2):
        model(ids)
    model.lamina._engine.readers.settle()
    recording.stop()
    assert recording.reads
    assert sum(read.nbytes for read in recording.reads) == model.lamina.stats.bytes_read - before
    assert all(read.begin < read.end and read.thread.startswith("lamina-reader") for read in recording.reads)
    assert max(level for _, level in recording.levels) <= model.lamina.plan.ring_bytes


def test_a_product_a_lookup_and_an_expert_of_packed_weights_are_heard(model: PreTrainedModel) -> None:
    panels = AFFINE["q4"].encode(torch.randn(6, 64))
    span = PanelSpan("q4", 0, 6, 1, panels.shape[1], 6, 0, 6)
    table, experts = (
        PackedTensor(shape, torch.float32, panels.flatten(), (span,), Scratch()) for shape in ((6, 64), (2, 3, 64))
    )
    recording = Recording(model)
    recording.start()
    torch.nn.functional.linear(torch.ones(1, 64), table)
    torch.nn.functional.embedding(torch.tensor([1, 1]), table)
    experts[1]
    recording.stop()
    heard = [(span.kind, span.name) for span in recording.spans]
    assert {(THROUGH, "linear"), (UNPACK, "product"), (THROUGH, "look_up"), (UNPACK, "unpack")} < {*heard}
    assert heard[-1] == (THROUGH, "expert")


def state(model: PreTrainedModel) -> list[Any]:
    """Everything that recording puts something else in the place of."""
    lamina, engine = model.lamina, model.lamina._engine
    owners = [lamina._passes, lamina._meter, engine, engine.binder, engine.materializer, engine.readers]
    owners += [engine.stream, engine.stream._ring, PackedTensor]
    hooks = [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules()]
    callables = [{name: value for name, value in vars(owner).items() if callable(value)} for owner in owners]
    return [callables, hooks, engine.readers._shared.on_read]


def test_nothing_is_recorded_before_and_after(model: PreTrainedModel) -> None:
    before = state(model)
    recording = Recording(model)
    recording.start()
    assert state(model) != before
    model(torch.tensor([PROMPT]))
    recording.stop()
    assert state(model) == before
    recorded = len(recording.spans), len(recording.levels)
    assert all(recorded)
    recording.reads.clear()
    model(torch.tensor([PROMPT]))
    assert (len(recording.spans), len(recording.levels), recording.reads) == (*recorded, [])


def test_after_an_error_in_the_model_nothing_is_recorded_any_more(model: PreTrainedModel) -> None:
    before = state(model)
    handle = model.lm_head.register_forward_pre_hook(_raise_in_the(profile.STEPS + 4))
    with pytest.raises(RuntimeError, match="on purpose"):
        profile_model(model, PROMPT, "t")
    handle.remove()
    assert state(model) == before
    assert not torch.autograd._profiler_enabled()
    profile_model(model, PROMPT, "t")


def _raise_in_the(last: int) -> Any:
    calls = itertools.count(1)

    def hook(*_: object) -> None:
        if next(calls) == last:
            raise RuntimeError("on purpose")

    return hook


def test_a_trace_is_what_perfetto_reads(named: tuple[str, PreTrainedModel], tmp_path: Path) -> None:
    name, model = named
    _, trace = profile_model(model, PROMPT, "the title")
    write_trace(tmp_path / "t.json", trace.record)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    tracks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        assert event.keys() >= {"name", "ph", "pid"}
        if event["ph"] == "X":
            assert event["name"] and event["ts"] >= 0 and event["dur"] >= 0
            begin = round(event["ts"] * 1000)
            tracks[event["tid"]].append((begin, begin + round(event["dur"] * 1000)))
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names.keys() == tracks.keys() | {1}
    assert names[1] == "model" and all(label.startswith("lamina-reader-") for label in list(names.values())[1:])
    for track in tracks.values():
        assert stacked(track)
    kinds = Counter(event["cat"] for event in events if event["ph"] == "X")
    assert kinds["step"] == kinds[PASS] == profile.STEPS
    assert kinds[LAYER] == profile.STEPS * model.config.num_hidden_layers
    assert kinds[OP] > kinds[LAYER]
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert (kinds["read"] > 0) == (name != "resident")
    assert ("reads in flight" in counters) == (name != "resident")


def stacked(slices: list[tuple[int, int]]) -> bool:
    """Whether each ends before the one it lies in does."""
    ends: list[int] = []
    for begin, end in sorted(slices, key=lambda slice: (slice[0], -slice[1])):
        while ends and ends[-1] <= begin:
            ends.pop()
        if ends and end > ends[-1]:
            return False
        ends.append(end)
    return True


def test_the_steps_of_very_many_units_are_fewer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MOST_RECORDED", 10)
    figures, _ = profile_model(model, PROMPT, "t")
    assert (figures["steps"], figures["profiled_steps"]) == (1, 1)


def test_bench_profiles_only_when_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    with steady():
        request = {"memory": minimum_of(folders["mixtral"], draft=None), "device": "cpu", "new_tokens": 3}
        request |= {"prompt_ids": PROMPT, "draft": None, "load": AutoModel.from_pretrained}
        file = tmp_path / "t.json"
        plain = bench_model(str(folders["mixtral"]), trace=file, **request)
        assert "profile" not in plain and not file.exists()
        watched = bench_model(str(folders["mixtral"]), profile=True, trace=file, **request)
    assert watched.keys() == plain.keys() | {"profile"}
    assert watched["tokens"] == plain["tokens"] and watched["passes"] == plain["passes"]
    assert watched["profile"]["trace"]["file"] == str(file)
    assert watched["profile"]["trace"]["bytes"] == file.stat().st_size
