"""The table of models: what its checks say of a model, of one that lies, and of one that dies; and its page."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.multimodal import write_case

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("steadily")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("models_table")


def line(family: str, task: str = "causal", **more: Any) -> dict[str, Any]:
    """A result, made up."""
    versions = {"lamina": "1", "torch": "2"}
    return {
        "family": family, "kind": f"{family}Model", "task": task, "class": f"{family}Model", "date": "2026-01-01",
        "versions": versions, "source": "tests/helpers", "streams": True, "fallbacks": [], **more,
    }  # fmt: skip


def test_a_model_is_found_to_be_equal(table: Any, tmp_path: Path) -> None:
    row = table.Row("llava", "image-text-to-text", "LlavaForConditionalGeneration")
    assert table.make(row, tmp_path)["class"] == row.kind
    tiny = table.Tiny(tmp_path)
    found = table.check_answers(tiny)
    assert {column: found[column] for column in ("text", "image", "generate")} == dict.fromkeys(
        ("text", "image", "generate"), "equal"
    )
    assert found["streams"] and "audio" not in found and "experts" not in found
    assert table.check_draft(tiny) == {"draft": "yes"}
    assert table.check_adapters(tiny) == {"adapters": "equal"}
    assert table.check_trained(tiny) == {"trained": "refused streaming, trains in memory"}


def test_a_classifier_is_not_asked_for_text(table: Any, tmp_path: Path) -> None:
    row = table.Row("bert", "token classification", "BertForTokenClassification")
    table.make(row, tmp_path)
    tiny = table.Tiny(tmp_path)
    assert table.check_draft(tiny) == {} and table.check_batched(tiny) == {}
    assert table.check_answers(tiny)["text"] == "equal"


def test_another_model_is_found_to_differ(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        write_case("BertModel", tmp_path / str(seed), seed=seed)
    tiny, other = (SimpleNamespace(folder=tmp_path / str(seed)) for seed in (0, 1))
    for each in (tiny, other):
        torch.save({"text": {"input_ids": torch.arange(3, 12)[None]}, "whole": {}}, each.folder / "inputs.pt")
    checked = table.Tiny(tiny.folder)
    monkeypatch.setattr(checked, "streamed", table.Tiny(other.folder).streamed)
    assert table.check_answers(checked)["text"].startswith("differs: by ")


def test_what_plain_transformers_cannot_do_is_told_apart(table: Any) -> None:
    def fails(_: Any) -> torch.Tensor:
        raise ValueError("no\nway")

    assert table.compared(None, None, fails) == "plain fails: ValueError: no way"
    assert table.compared(0, 1, lambda model: torch.full((2,), model)) == "differs: by 1"
    assert table.compared(2, 3, lambda model: torch.zeros(model)) == "differs: shape (3,) for (2,)"


def test_a_check_that_dies_or_hangs_says_so(table: Any) -> None:
    assert table.apart(lambda: {"text": "equal"}, 30) == ({"text": "equal"}, None)
    assert table.apart(lambda: os._exit(7), 30) == (None, "died, exit code 7")
    assert table.apart(lambda: time.sleep(60), 0.2) == (None, "took more than 0 s")
    assert table.apart(lambda: 1 // 0, 30)[1].startswith("ZeroDivisionError")


def test_what_is_there_is_not_run_again(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "models.jsonl")
    known = line("llama") | {"kind": "LlamaForCausalLM"}
    still = line("mistral") | {"kind": "MistralForCausalLM", "not_run": True}
    (tmp_path / "models.jsonl").write_text("".join(table.json.dumps(each) + "\n" for each in (known, still)))

    def wanted(**given: Any) -> set[tuple[str, str]]:
        asked = SimpleNamespace(**{"only": None, "again": False, "task": None, "share": "1/1"} | given)
        return {(row.family, row.task) for row in table._wanted(asked)}

    everything = {(row.family, row.task) for row in table.rows()}
    assert wanted(again=True) == everything
    assert wanted() == everything - {("llama", "causal")}
    assert wanted(only=["llama"], task=["causal"]) == {("llama", "causal")}
    assert wanted(share="1/2") | wanted(share="2/2") == wanted() and not wanted(share="1/2") & wanted(share="2/2")


def test_every_family_of_the_mappings_has_a_row(table: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    rows = table.rows()
    assert {(family, kind) for family, kind in CAUSAL.items() if isinstance(kind, str)} <= {
        (row.family, row.kind) for row in rows
    }
    assert len({(row.family, row.kind) for row in rows}) == len(rows)


def test_the_page_has_each_result_its_reason_and_what_was_not_made(table: Any) -> None:
    cells = {"text": "equal", "generate": "equal", "draft": "no: it keeps a state", "batched": "plain fails: Error: x"}
    page = table.page(
        [
            line("llama", cells={**cells, "draft": "yes"}),
            line("mamba", cells=cells),
            line("jamba", cells={**cells, "text": "differs: by 0.5"}),
            line("dory", not_made="no module `tests`"),
            {"family": "bert", "kind": "BertModel", "task": "text encoding", "not_run": True},
        ]
    )
    assert "| llama | llamaModel | equal | - | - | equal | - | yes | plain fails | - | - |" in page
    assert "- *draft*, no: it keeps a state: mamba (mambaModel), jamba (jambaModel)" in page
    assert "- *text*, differs: by 0.5: jamba (jambaModel)" in page
    assert "- dory (doryModel, causal): no module \\`tests\\`" in page
    assert page.endswith("## Not run yet\n\n- text encoding: bert\n")
    assert "3 classes. 3 of them stream" in page
    assert "| text | 3 | 2 | 0 | 0 | 1 |" in page
    assert "| draft | 3 | 1 | 0 | 2 | 0 |" in page


def test_what_takes_no_text_alone_is_not_asked_for_it(table: Any) -> None:
    cells = {"text": "plain fails: Error: no sound", "audio": "equal"}
    assert table.cell({"cells": cells}, "text") == "-"
    assert table.cell({"cells": cells | {"audio": "plain fails: Error: no sound"}}, "text") == cells["text"]


def test_the_last_result_of_a_class_counts(table: Any, tmp_path: Path) -> None:
    file = tmp_path / "models.jsonl"
    lines = [line("llama", date="2026-01-01"), line("bert", "text encoding"), line("llama", date="2026-02-02")]
    file.write_text("".join(f"{table.json.dumps(each)}\n" for each in lines))
    assert [(each["family"], each["date"]) for each in table.read(file)] == [
        ("llama", "2026-02-02"),
        ("bert", "2026-01-01"),
    ]
