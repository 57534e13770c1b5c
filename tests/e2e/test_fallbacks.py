"""A second way is said once, with its reason: as a warning, on the command line, in the plan and in the stats."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import lamina
from helpers.families import write_tiny
from helpers.judge import CONTEXT, minimum_of, streamed_model
from lamina import FallbackWarning
from lamina.codec import native
from lamina.fallbacks import Fallbacks, cause
from lamina.store import split
from lamina.stream import direct_io
from unit.cli.test_commands import Run

pytestmark = pytest.mark.usefixtures("steadily")

IDS = torch.tensor([[5, 9, 23, 17, 5, 9, 23]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    write_tiny("llama", folder, dtype=torch.bfloat16)
    return folder


def planned(folder: Path, **options: object) -> tuple[str, ...]:
    plan = lamina.plan_model(str(folder), memory="2GB", device="cpu", context=CONTEXT, draft=None, **options)
    assert list(plan.fallbacks) == plan.as_dict()["fallbacks"]
    return plan.fallbacks


def test_each_is_said_once() -> None:
    said = Fallbacks()
    with pytest.warns(FallbackWarning) as caught:
        said.say("the first")
        said.say(["the first", "the second"])
    assert [str(each.message) for each in caught] == ["the first", "the second"]
    assert tuple(said) == ("the first", "the second")


def test_a_cause_is_one_short_line() -> None:
    assert cause(ValueError()) == "ValueError"
    long = cause(RuntimeError("many\n words " * 50))
    assert long.startswith("RuntimeError: many words many") and long.endswith(" ...") and len(long) < 170


def test_a_usual_model_takes_none(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model = streamed_model(folder, minimum_of(folder), draft="lookup")
        with model.lamina:
            model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert model.lamina.stats.fallbacks == () == planned(folder)


def test_a_codec_without_a_kernel(folder: Path, tmp_path: Path) -> None:
    store = Path(split(str(folder), to=str(tmp_path / "store"), compression="8bit").folder)
    with native.switched_off():
        (said,) = planned(store)
        assert "q8" in said and "unpacked by torch" in said and "switched off" in said
        with pytest.warns(FallbackWarning, match="unpacked by torch"):
            model = streamed_model(store, minimum_of(store), draft=None)
        assert model.lamina.stats.fallbacks == (said,)
    if native.available():
        assert planned(store) == ()


def test_direct_reads_that_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io.PosixFile, "_open_direct", lambda self: False)
    (said,) = planned(folder)
    assert str(folder) in said and "refuses direct reads" in said
    with pytest.warns(FallbackWarning, match="refuses direct reads"):
        assert streamed_model(folder, minimum_of(folder), draft=None).lamina.stats.fallbacks == (said,)


def test_a_draft_that_was_asked_for_and_is_off(tmp_path: Path) -> None:
    write_tiny("mamba2", tmp_path, dtype=torch.float32)
    model = streamed_model(tmp_path, minimum_of(tmp_path, draft="lookup"), draft="lookup")
    with model.lamina, pytest.warns(FallbackWarning, match="draft 'lookup' is off: .* cannot forget"):
        model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    stats = model.lamina.stats
    assert (stats.draft, stats.drafted_tokens) == ("none", 0)
    assert "cannot forget" in stats.draft_reason and any("draft 'lookup' is off" in each for each in stats.fallbacks)
    default = streamed_model(tmp_path, minimum_of(tmp_path))
    with default.lamina:
        default.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert default.lamina.stats.fallbacks == (), "nobody asked for a draft"


def test_a_draft_that_proposes_nothing_says_why(folder: Path) -> None:
    model = streamed_model(folder, minimum_of(folder, draft="lookup"), draft="lookup")
    with model.lamina:
        model.generate(torch.arange(3, 9)[None], max_new_tokens=1, do_sample=False, pad_token_id=0)
        assert model.lamina.stats.draft_reason == "asked for, but an answer of one token has nothing to draft"
        model.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=0)
        stats = model.lamina.stats
    assert stats.drafted_tokens or stats.draft_reason.startswith("asked for, but it ")


def test_the_command_line_says_them(run: Run, tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path, dtype=torch.float32)

    def said(*arguments: str) -> tuple[str, str]:
        result = run(*arguments)
        assert result.code == 0, result.err
        return result.out, result.err

    why = "the pass was traced with made-up numbers where the model asks for real ones"
    asked = [str(tmp_path), "--memory", "2GB", "--device", "cpu"]
    assert f"fallback: {why}" in said("plan", *asked)[0]
    out, err = said("plan", *asked, "--json")
    assert why in json.loads(out)["fallbacks"][0] and err.count(why) == 1
    out, err = said("run", *asked, "--prompt-ids", "5,6,7", "-n", "3", "--json")
    assert why in json.loads(out)["stats"]["fallbacks"][0] and err.count(f"lamina: {why}") == 1
    assert why not in said("run", *asked, "--prompt-ids", "5,6,7", "-n", "2", "--quiet")[1]
