"""The scale page: shapes have the published sizes, its figures are what the planner says today, runs are checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = (8.03, 32.8, 70.6, 30.5, 116.8, 235.1, 405.9, 671.0, 1026.0, 2761.0)  # billions of parameters


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale as script

    yield script
    for name in ("scale", "passes", "report", "lamina_cli", "capped"):
        sys.modules.pop(name, None)


def test_the_shapes_have_the_published_sizes(scale: Any) -> None:
    for model, billions in zip(scale.MODELS, PUBLISHED, strict=True):
        weights = scale.schedule(model, "bf16").weights.values()
        assert sum(weight.elements for weight in weights) / 1e9 == pytest.approx(billions, rel=0.005), model.name


def test_the_page_says_what_the_planner_says(scale: Any) -> None:
    """When the planner changes: `python benchmarks/scale.py` writes the page again."""
    page = (ROOT / "docs" / "scale.md").read_text()
    model = next(model for model in scale.MODELS if model.name == "Llama-3.1-8B")
    for machine in scale.MACHINES:
        section = page.split(f"### {machine.name}: ")[1]
        row = next(line for line in section.splitlines() if line.startswith(f"| {model.name} |"))
        assert row in scale.scale_tables((model,), (machine,)), machine.name
    assert scale.machine_table() in page


def test_runs_with_a_prediction_are_found_and_their_errors_stated(
    scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(took: float, said: float, planned: float) -> dict[str, Any]:
        return {"seconds_per_token": took, "predicted_seconds_per_token": said, "planned_seconds_per_token": planned,
                "bytes_read_per_pass": 10**9, "memory_budget_bytes": 2 * 10**9}  # fmt: skip

    old = {"seconds_per_token": 1.0, "predicted_seconds_per_token": 9.0}
    (tmp_path / "compare.jsonl").write_text(json.dumps({"model": "a", **run(1.0, 1.1, 2.0)}) + "\n" + json.dumps(old))
    (tmp_path / "stores.jsonl").write_text(json.dumps({"rounds": [{"plain": run(2.0, 1.0, 2.1), "4bit": old}]}))
    monkeypatch.setattr(scale, "RESULTS", tmp_path)
    found = list(scale.measured())
    assert [(each["file"], each["model"]) for each in found] == [("compare", "a"), ("stores", "plain")]
    said = scale.check_table(found)
    assert "| a | 2.00 GB | 1.00 GB | 1 | 1.1 | +10% | 2 | +100% |" in said
    assert "As predicted: median error 30%, worst 50%, 1 of 2 within 15%." in said


def test_a_page_without_a_place_is_refused(scale: Any, tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    page.write_text("before\n<!-- check -->\nold\n<!-- /check -->\nafter\n")
    scale.write(page, "check", "new")
    assert page.read_text() == "before\n<!-- check -->\n\nnew\n\n<!-- /check -->\nafter\n"
    with pytest.raises(scale.MeasuringError, match="no place for the tables"):
        scale.write(page, "scale", "new")
