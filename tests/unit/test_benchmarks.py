"""The comparison: what its tables make of recorded lines, and that docs/benchmarks.md says what the lines say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("tables", monkeypatch)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("compare", monkeypatch)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("turns", monkeypatch)


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("workloads", monkeypatch)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module beside the benchmarks, which import each other as scripts do."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module(name)


def line(engine: str = "lamina", **more: Any) -> dict[str, Any]:
    """One recorded run, made up."""
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": 8 * 10**9, "kernel": "6.1"},
        "packages": {"torch": "2.13.0"},
        "series": "first",
        "workload": "dense",
        "figure": "seconds_per_token",
        "model": "3b",
        "model_bytes": 6 * 10**9,
        "asked_cap_bytes": 3 * 10**9,
        "cap_bytes": 3 * 10**9,
        "engine": engine,
        "failure": None,
        "new_tokens": 4,
        "tokens": [1, 2, 3, 4],
        "seconds_per_token": 1.0,
        "peak_rss_bytes": 10**9,
        "read_bytes": 20 * 10**9,
    } | more


def of_seconds(engine: str, *figures: float) -> list[dict[str, Any]]:
    return [line(engine, seconds_per_token=figure) for figure in figures]


def test_medians_spread_and_ratios(tables: Any) -> None:
    lines = [*of_seconds("lamina", 2.0, 1.0, 9.0), *of_seconds("llama_cpp", 5.0, 4.0)]
    summary = tables.summarize(lines, "seconds_per_token")
    assert summary["lamina"]["seconds_per_token"] == {"median": 2.0, "min": 1.0, "max": 9.0}
    assert summary["lamina"]["times_lamina"] == 1
    assert summary["llama_cpp"]["times_lamina"] == 2.25
    assert summary["llama_cpp"]["runs"] == 2


def test_a_failed_run_counts_as_a_run_and_gives_no_figure(tables: Any) -> None:
    killed = line("llama_cpp", failure="killed for memory", seconds_per_token=None)
    summary = tables.summarize([*of_seconds("lamina", 2.0), *of_seconds("llama_cpp", 6.0), killed], "seconds_per_token")
    assert summary["llama_cpp"]["times_lamina"] == 3
    assert (summary["llama_cpp"]["runs"], summary["llama_cpp"]["failed"]) == (2, 1)


def test_what_only_failed_stands_last_with_its_reason(tables: Any) -> None:
    killed = line("airllm", failure="killed for memory", seconds_per_token=None, tokens=None)
    heads, rows = tables.rows_of([killed, *of_seconds("llama_cpp", 6.0), *of_seconds("lamina", 2.0)])
    assert [row[0] for row in rows] == ["Lamina", "llama.cpp", "AirLLM"]
    last = dict(zip(heads, rows[-1], strict=True))
    assert last["s/token"] == "killed for memory"
    assert last["runs"] == "0/1"
    assert last["x Lamina"] == "-"


def test_the_disk_itself_is_the_bytes_of_a_pass_at_the_rate_around_the_run(tables: Any) -> None:
    rates = {"bare_before_bytes_per_second": 10**9, "bare_after_bytes_per_second": 3 * 10**9}
    summary = tables.summarize(
        [line(bytes_read_per_pass=4 * 10**9, seconds_per_token=2.5, **rates)], "seconds_per_token"
    )
    assert summary["disk"]["seconds_per_token"]["median"] == 2.0
    assert summary["disk"]["times_lamina"] == 0.8


def test_without_a_rate_there_is_no_disk_row(tables: Any) -> None:
    assert "disk" not in tables.summarize([line(bytes_read_per_pass=4 * 10**9)], "seconds_per_token")


def test_bytes_of_a_pass_are_laminas_own_count_or_the_runs_over_its_passes(tables: Any) -> None:
    assert tables.read_a_pass(line(bytes_read_per_pass=3 * 10**9)) == 3e9
    assert tables.read_a_pass(line("llama_cpp")) == 5e9
    assert tables.read_a_pass(line(bytes_read_per_pass=0, figure="wall_seconds", new_tokens=1)) == 20e9


def test_the_newest_series_counts_for_each_cap(tables: Any) -> None:
    old = [line(seconds_per_token=9.0), line(seconds_per_token=9.0, asked_cap_bytes=None)]
    new = [line(series="second", date="2026-01-02T00:00:00+00:00")]
    found = tables.newest([*new, *old])
    assert found[tables.Key("dense", "3b", 3 * 10**9)] == new
    assert found[tables.Key("dense", "3b", None)] == [old[1]]


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ([1, 2, 3], [1, 2, 3, 4], "3/3"),
        ([1, 2, 3], [1, 5, 3], "1/3"),
        ([[1, 2], [3, 4]], [[1, 9], [3, 4]], "3/4"),
        (None, [1], "-"),
    ],
)
def test_same_counts_the_leading_tokens(tables: Any, ours: Any, theirs: Any, same: str) -> None:
    assert tables.agreement(ours, theirs) == same


def test_the_batch_table_has_rates_and_passes(tables: Any) -> None:
    heads, rows = tables.rows_of([line(workload="batch", batch_seconds=8.0, tokens_per_second=16.0, passes=4)])
    shown = dict(zip(heads, rows[0], strict=True))
    assert (shown["tokens/s"], shown["passes"], shown["read a pass, GB"]) == ("16", "4", "5.00")


def test_a_run_without_a_cgroup_says_so(tables: Any) -> None:
    key = tables.Key("dense", "3b", 3 * 10**9)
    assert "uncapped" in tables.title(key, [line(cap_bytes=None)])
    assert "uncapped" not in tables.title(key, [line()])


def test_a_page_is_rewritten_between_its_marks_only(tables: Any) -> None:
    page = "before\n<!-- compare:dense-3b -->\nold\n<!-- end -->\nafter <!-- compare:moe -->\n<!-- end -->\n"
    once = tables.rewritten(page, [line()])
    assert once.startswith("before\n<!-- compare:dense-3b -->\n") and "after" in once
    assert "old" not in once and "| Lamina | 1 |" in once and "Not measured yet." in once
    assert tables.rewritten(once, [line()]) == once


def test_the_page_says_what_the_lines_say(tables: Any) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    lines = tables.read_lines(BENCHMARKS / "results" / "compare.jsonl")
    assert page == tables.rewritten(page, lines), "run: python benchmarks/compare.py --write-docs"


def test_the_page_has_a_place_for_every_workload(tables: Any, workloads: Any) -> None:
    names = [found[2] for found in tables.MARKED.finditer((ROOT / "docs" / "benchmarks.md").read_text())]
    assert all(any(name == each or name.startswith(f"{each}-") for name in names) for each in workloads.WORKLOADS)


def test_every_engine_of_a_workload_is_an_engine(workloads: Any) -> None:
    for workload in workloads.WORKLOADS.values():
        assert set(workload.engines) <= set(workloads.ENGINES)


@pytest.mark.parametrize(
    ("text", "wanted"), [("1/3", 2 * 10**9), ("5/6", 5 * 10**9), ("3GB", 3 * 10**9), ("none", None)]
)
def test_a_cap_is_a_share_a_size_or_none(workloads: Any, text: str, wanted: int | None) -> None:
    assert workloads.cap_of(text, 6 * 10**9) == wanted


@pytest.mark.parametrize("text", ["half", "1/0", "3 apples"])
def test_a_cap_that_is_none_of_these_is_refused(workloads: Any, text: str) -> None:
    with pytest.raises(Exception, match=r"no cap .* wanted a share"):
        workloads.cap_of(text, 6 * 10**9)


def test_the_copies_of_a_model(workloads: Any) -> None:
    packed = workloads.model_named("3b-4bit", Path("bench"))
    assert packed.checkpoint == Path("bench/llama-3b")
    assert packed.for_lamina == Path("bench/llama-3b-4bit")
    assert packed.gguf == Path("bench/llama-3b.q4_0.gguf")
    assert workloads.model_named("3b-lossless", Path("bench")).gguf == Path("bench/llama-3b.gguf")
    with pytest.raises(Exception, match="no model named '4b'"):
        workloads.model_named("4b", Path("bench"))


def test_accelerate_is_tried_again_with_less(workloads: Any) -> None:
    workload = workloads.WORKLOADS["dense"]
    case = workloads.Case(workload, workloads.model_named("3b", Path("bench")), 6 * 10**9, 8)
    tried = workloads.ENGINES["accelerate_disk"].commands("python", case)
    assert [command[-1] for command in tried] == ["2000000000", "1000000000"]


def test_every_engine_has_each_turn_as_often(turns: Any) -> None:
    orders = [turns.order(["a", "b", "c"], number) for number in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert orders[:3] == [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]]
    assert list(turns.in_turns("ab", 2)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_a_recorded_line_has_no_place_of_this_machine(compare: Any) -> None:
    assert compare.without_paths("exit 1: no '/home/me/x/model.gguf' in /a/b") == "exit 1: no 'model.gguf' in b"
    assert compare.without_paths("one/two 1/3") == "one/two 1/3"
