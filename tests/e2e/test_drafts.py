"""Every kind of draft on models of its own: what is written, shared, refused, counted; the answer is the same.

A tiny random model says what no copy of it in 4 bits would predict for long; that is enough: what is proposed here is
verified, and what goes wrong with memory, caches or interruptions shows in the answer.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import lamina.speculative.setup
from helpers.always import Always
from helpers.families import write_tiny
from helpers.judge import CONTEXT, minimum_of, plain_model
from helpers.multimodal import write_case
from helpers.tiny import words, write_llama
from helpers.wavering import Wavering
from lamina import (
    AutoModel,
    BudgetError,
    FallbackWarning,
    LaminaError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
    WriteError,
    plan_model,
)
from lamina.sizes import format_size
from lamina.speculative.decoder import MOST
from lamina.store import split
from lamina.store.work import Splitter

pytestmark = pytest.mark.usefixtures("steadily")

IDS = torch.tensor([[5, 99, 23, 77, 5, 99, 23, 77, 5, 99, 23]])
NEW = 24
VOCABULARY = 256


def write(folder: Path, seed: int = 1, **fields: Any) -> Path:
    """A tiny Llama with a table of its own (not tied)."""
    fields = {"num_hidden_layers": 3, "intermediate_size": 128, "pad_token_id": 0} | fields
    return write_llama(folder, seed=seed, spread=0.2, **fields)


def with_words(folder: Path, first: str = "w") -> Path:
    words([f"{first}{i}" for i in range(VOCABULARY)], f"{first}0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, with a copy beside it."""
    folder = write(tmp_path_factory.mktemp("drafts") / "model")
    AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft="self").lamina.close()
    return folder


@pytest.fixture
def alone(written: Path, tmp_path: Path) -> Path:
    """The model without a copy."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with as many tokens."""
    return write(tmp_path_factory.mktemp("drafts") / "small", seed=2, hidden_size=32)


@pytest.fixture(scope="module")
def answer(written: Path) -> list[int]:
    """Of plain transformers, longer than any test needs."""
    out = plain_model(written).generate(IDS, max_new_tokens=4 * NEW, do_sample=False)
    return out[0].tolist()


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[PreTrainedModel]:
    model = AutoModel.from_pretrained(str(folder), **{"device": "cpu", "context": CONTEXT, **options})
    with model.lamina:
        insist(model)
        yield model


def insist(model: PreTrainedModel) -> None:
    """Let no draft be paused, however seldom it is right."""
    drafts = model.lamina.decoder._drafts
    for name, (draft, _) in list(drafts.items()):
        drafts[name] = draft, Always(MOST, None, 0.0, must=True)


def same(model: PreTrainedModel, answer: list[int], new: int = NEW, **asked: Any) -> None:
    out = model.generate(IDS, max_new_tokens=new, do_sample=False, **asked)
    assert out[0].tolist() == answer[: IDS.shape[1] + new]


def refusal(kind: type[Exception], folder: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_call_names_the_first_draft_of_a_model_that_was_loaded_without(written: Path, answer: list[int]) -> None:
    model = AutoModel.from_pretrained(str(written), device="cpu", context=CONTEXT, draft=None)
    with model.lamina:
        same(model, answer)
        same(model, answer, draft="none", exact=True)
        assert (model.lamina.stats.draft, model.lamina.stats.draft_reason) == ("none", "asked for")
        assert (model.lamina.plan.draft, model.lamina.plan.draft_reason) == ("none", "asked for")
        same(model, answer, draft="lookup")
        assert model.lamina.stats.draft == "lookup"
        same(model, answer)
        assert model.lamina.plan.draft == "none"
        with pytest.raises(RequestError, match="'lookup', 'self', or a model"):
            model.generate(IDS, max_new_tokens=1, draft=3)


# -- a copy of the model


def test_a_copy_is_written_beside_the_model_once(alone: Path, answer: list[int]) -> None:
    copy = alone.parent / "model-4bit"
    told: list[str] = []
    with opened(alone, draft="self", progress=lambda what, *_: told.append(what)) as model:
        assert copy.is_dir()
        assert "split" in told
        same(model, answer)
        assert model.lamina.stats.drafted_tokens > 0
        assert (model.lamina.stats.draft, model.lamina.stats.draft_reason) == ("self", "asked for")
    written = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    told.clear()
    with opened(alone, draft="self", progress=lambda what, *_: told.append(what)) as model:
        same(model, answer)
    assert "split" not in told
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == written


def test_a_copy_has_the_models_own_norms_and_table(written: Path) -> None:
    with opened(written, draft="self") as model:
        copy = model.lamina.decoder._drafts["self"][0].model
        ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
        assert ours.keys() == theirs.keys()
        shared = {name for name in ours if ours[name] is theirs[name]}
        assert "model.embed_tokens.weight" in shared
        assert {name for name in ours if "norm" in name} <= shared
        assert not any("proj" in name or "lm_head" in name for name in shared)


def test_a_copy_whose_table_is_tied_has_its_own(tmp_path: Path) -> None:
    config = write(tmp_path / "model")
    tied = LlamaForCausalLM.from_pretrained(config, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "model")
    expected = tied.generate(IDS, max_new_tokens=NEW, do_sample=False)[0].tolist()
    with opened(tmp_path / "model", draft="self") as model:
        copy = model.lamina.decoder._drafts["self"][0].model
        assert copy.lm_head.weight is not model.lm_head.weight
        same(model, expected)


def test_the_copys_bytes_are_in_the_plan(written: Path) -> None:
    figures = {}
    for draft in (None, "lookup", "self"):
        with opened(written, draft=draft) as model:
            plan = model.lamina.plan.as_dict()
            figures[draft] = plan["draft_bytes"]
            assert model.lamina.stats.draft_bytes == plan["draft_bytes"]
    assert figures[None] == 0 < figures["lookup"] < figures["self"]
    with opened(written, draft="self") as model:
        copy = model.lamina.decoder._drafts["self"][0].model
        shared = {id(parameter) for parameter in model.parameters()}
        own = sum(getattr(p, "memory", p).untyped_storage().nbytes() for p in copy.parameters() if id(p) not in shared)
        assert figures["self"] - figures["lookup"] >= own > 0


def test_less_memory_than_a_copy_needs_is_refused_and_the_least_is_enough(written: Path, answer: list[int]) -> None:
    without, least = minimum_of(written, draft=None), minimum_of(written, draft="self")
    assert least > without
    text = refusal(BudgetError, written, memory=least - 1, draft="self")
    assert "and a draft of" in text and "draft='none'" in text
    with opened(written, memory=least, draft="self") as model:
        assert model.lamina.plan.streams
        same(model, answer)
        assert model.lamina.stats.drafted_tokens > 0


def test_a_model_in_4_bits_has_no_smaller_copy(written: Path) -> None:
    store = written.parent / "model-4bit"
    assert "4 bits a weight already" in refusal(UnsupportedError, store, draft="self")
    assert not (written.parent / "model-4bit-4bit").exists()


def test_a_compressed_model_is_drafted_for_by_the_copy_of_the_original(alone: Path) -> None:
    with opened(alone, compression="8bit", draft=None) as model:
        expected = model.generate(IDS, max_new_tokens=NEW, do_sample=False)[0].tolist()
    with opened(alone, compression="8bit", draft="self") as model:
        same(model, expected)
        assert model.lamina.stats.drafted_tokens > 0
    assert {each.name for each in alone.parent.iterdir()} == {"model", "model-4bit", "model-8bit"}


# -- nobody's choice


def test_auto_without_a_copy_is_a_lookup_and_says_why(alone: Path, answer: list[int]) -> None:
    with opened(alone) as model:
        stats = model.lamina.stats
        assert stats.draft == "lookup"
        assert "draft='self' writes one" in stats.draft_reason
        same(model, answer)
    assert not (alone.parent / "model-4bit").exists()


@pytest.mark.parametrize("paying", [True, False])
def test_auto_with_a_copy_takes_it_where_it_pays(
    written: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch, paying: bool
) -> None:
    seen: list[tuple[int, int]] = []

    def pays(without: Any, with_copy: Any, nbytes: int, row: float) -> tuple[bool, str]:
        seen.append((without.budget.draft_bytes, with_copy.budget.draft_bytes))
        return paying, "so the forecast says"

    monkeypatch.setattr(lamina.speculative.setup, "pays", pays)
    with opened(written) as model:
        assert model.lamina.stats.draft == ("self" if paying else "lookup")
        assert model.lamina.stats.draft_reason == "so the forecast says"
        ((without, with_copy),) = seen
        assert without == 0 < with_copy
        assert (model.lamina.plan.budget.draft_bytes == with_copy) is paying
        same(model, answer)


def test_auto_where_a_copy_has_no_room(written: Path, answer: list[int]) -> None:
    least = minimum_of(written, draft="lookup")
    with opened(written, memory=least + 1) as model:
        assert model.lamina.stats.draft == "lookup"
        assert "no room for the copy" in model.lamina.stats.draft_reason
        same(model, answer)


# -- another model


def test_another_model_drafts(written: Path, small: Path, answer: list[int]) -> None:
    with opened(written, draft=str(small)) as model:
        same(model, answer)
        stats = model.lamina.stats
        assert (stats.draft, stats.draft_reason) == (str(small), "asked for")
        assert stats.drafted_tokens > 0
        assert stats.draft_bytes > 0


def test_a_model_drafts_for_itself(written: Path, answer: list[int]) -> None:
    """Nearly all of its tokens are right, so its cache goes on from what was accepted."""
    with opened(written, draft=str(written)) as model:
        same(model, answer)
        stats = model.lamina.stats
        assert stats.accepted_tokens > 0.5 * stats.drafted_tokens
        assert stats.passes < NEW // 2


def test_a_model_with_other_tokens_is_refused(alone: Path, tmp_path: Path, small: Path) -> None:
    other = with_words(Path(shutil.copytree(small, tmp_path / "other")), "x")
    with_words(alone)
    text = refusal(RequestError, alone, draft=str(other))
    assert str(other) in text and "has other tokens than the model" in text


def test_a_model_with_more_tokens_is_refused(written: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more", vocab_size=VOCABULARY + 40)
    assert "has 296 tokens and the model 256" in refusal(RequestError, written, draft=str(more))


def test_a_draft_that_is_not_there_is_refused(written: Path, tmp_path: Path) -> None:
    text = refusal(ModelNotFoundError, written, draft=str(tmp_path / "nonsense"))
    assert "nonsense" in text


@pytest.mark.parametrize("draft", [3, True, "", ["lookup"]])
def test_a_draft_that_is_no_text_is_refused(written: Path, draft: Any) -> None:
    assert "'none', 'auto', 'lookup', 'self', or a model" in refusal(RequestError, written, draft=draft)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "BertForTokenClassification", "BertModel"])
def test_what_gives_no_text_has_no_draft_and_no_room_for_one(tmp_path: Path, kind: str) -> None:
    write_case(kind, tmp_path)
    least = minimum_of(tmp_path, draft=None)
    assert minimum_of(tmp_path) == least
    with AutoModel.from_pretrained(str(tmp_path), device="cpu", memory=least, context=CONTEXT) as model:
        stats = model.lamina.stats
        assert (stats.draft, stats.draft_bytes) == ("none", 0)
        assert "gives no text" in stats.draft_reason
        assert not any("draft" in fallback for fallback in stats.fallbacks)
    planned = plan_model(str(tmp_path), device="cpu", memory=least, context=CONTEXT)
    assert planned.draft == "none" and "gives no text" in planned.draft_reason


def test_a_draft_that_was_asked_for_of_what_gives_no_text_is_told_to_be_off(tmp_path: Path) -> None:
    write_case("LlamaForSequenceClassification", tmp_path / "model")
    with pytest.warns(FallbackWarning, match="draft 'self' is off: the model gives no text"):
        model = AutoModel.from_pretrained(str(tmp_path / "model"), device="cpu", context=CONTEXT, draft="self")
    with model:
        assert model.lamina.stats.draft == "none"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no copy was written"


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_a_draft_with_a_state_is_off_and_says_why(
    written: Path, tmp_path: Path, answer: list[int], family: str
) -> None:
    write_tiny(family, tmp_path / family)
    with opened(written, draft=str(tmp_path / family)) as model:
        same(model, answer)
        stats = model.lamina.stats
        assert stats.drafted_tokens == 0
        assert "keeps a state that cannot forget" in stats.draft_reason


@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_what_takes_one_token_beside_its_cache_decodes_without_a_draft(tmp_path: Path, family: str) -> None:
    write_tiny(family, tmp_path)
    wanted = plain_model(tmp_path).generate(IDS, max_new_tokens=8, do_sample=False)
    with AutoModel.from_pretrained(str(tmp_path), device="cpu", context=CONTEXT) as model:
        model.lamina.decoder._drafts["lookup"] = Wavering(wanted[0].tolist()), Always(MOST, None, 0.0, must=True)
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), wanted)
        assert model.lamina.stats.drafted_tokens == 0
        assert "one token beside its cache" in model.lamina.stats.draft_reason


def test_a_draft_that_looks_back_through_a_convolution(written: Path, tmp_path: Path, answer: list[int]) -> None:
    write_tiny("lfm2", tmp_path / "lfm2")
    with opened(written, draft=str(tmp_path / "lfm2")) as model:
        same(model, answer)
        assert model.lamina.stats.drafted_tokens > 0


# -- named by a call


def test_a_call_has_its_own_draft(written: Path, answer: list[int]) -> None:
    with opened(written, draft="self") as model:
        same(model, answer, draft="lookup")
        assert model.lamina.stats.draft == "lookup"
        drafted = model.lamina.stats.drafted_tokens
        same(model, answer, draft="none")
        assert model.lamina.stats.drafted_tokens == drafted
        same(model, answer)
        assert model.lamina.stats.draft == "self"


def test_a_draft_that_is_named_late_gets_room(written: Path, small: Path, answer: list[int]) -> None:
    with opened(written, memory=minimum_of(written, draft=str(small)), draft=None) as model:
        before = model.lamina.plan.budget
        assert before.draft_bytes == 0
        resident = model.lamina.plan.resident_bytes
        same(model, answer, draft=str(small))
        after = model.lamina.plan
        assert after.budget.memory_bytes == before.memory_bytes
        assert after.budget.draft_bytes > 0
        assert after.resident_bytes < resident
        assert model.lamina.stats.drafted_tokens > 0
        same(model, answer, draft=str(small))
        assert model.lamina.plan.budget.draft_bytes == after.budget.draft_bytes  # once
        same(model, answer, draft=None)


def test_a_copy_that_is_named_late(alone: Path, answer: list[int]) -> None:
    with opened(alone, draft=None) as model:
        same(model, answer, draft="self")
        assert model.lamina.stats.drafted_tokens > 0
        assert (alone.parent / "model-4bit").is_dir()


def test_no_room_for_a_draft_that_is_named_late(written: Path, small: Path, answer: list[int]) -> None:
    with opened(written, memory=minimum_of(written, draft=None), draft=None) as model:
        with pytest.raises(BudgetError, match="a draft"):
            model.generate(IDS, max_new_tokens=NEW, do_sample=False, draft=str(small))
        assert model.lamina.plan.budget.draft_bytes == 0
        same(model, answer)


def test_nonsense_named_by_a_call_leaves_the_model_usable(written: Path, answer: list[int]) -> None:
    with opened(written, draft="lookup") as model:
        plan = model.lamina.plan
        with pytest.raises(ModelNotFoundError):
            model.generate(IDS, max_new_tokens=NEW, do_sample=False, draft="no/such/folder/at-all")
        with pytest.raises(RequestError):
            model.generate(IDS, max_new_tokens=NEW, do_sample=False, draft=3)
        assert model.lamina.plan == plan
        same(model, answer)
        assert model.lamina.stats.draft == "lookup"


# -- one answer after the other


@pytest.fixture(params=["self", "lookup", "model"])
def drafting(request: pytest.FixtureRequest, written: Path, small: Path) -> Iterator[PreTrainedModel]:
    draft = str(small) if request.param == "model" else request.param
    with opened(written, draft=draft, memory=minimum_of(written, draft=draft)) as model:
        model.lamina.decoder._draft(draft, False)
        insist(model)
        yield model


def test_one_answer_after_the_other(drafting: PreTrainedModel, answer: list[int], written: Path) -> None:
    same(drafting, answer)
    other = torch.tensor([[7, 7, 200, 13]])
    expected = plain_model(written).generate(other, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(drafting.generate(other, max_new_tokens=NEW, do_sample=False), expected)
    same(drafting, answer)


def test_a_chat_goes_on(drafting: PreTrainedModel, written: Path) -> None:
    """The second prompt is the first one, its answer, and what the user said next."""
    plain, text = plain_model(written), IDS
    for more in ([3, 4, 5], [5, 99, 23]):
        text = torch.cat([text, torch.tensor([more])], 1)
        out = drafting.generate(text, max_new_tokens=8, do_sample=False)
        assert torch.equal(out, plain.generate(text, max_new_tokens=8, do_sample=False))
        text = out


class Interrupting:
    """Presses Ctrl-C at a token."""

    def __init__(self, at: int) -> None:
        self.left = at

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("at", [2, 9])
def test_an_interrupted_answer_leaves_the_next_one_right(drafting: PreTrainedModel, answer: list[int], at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        drafting.generate(IDS, max_new_tokens=NEW, do_sample=False, streamer=Interrupting(at))
    same(drafting, answer)
    assert drafting.lamina.stats.drafted_tokens > 0


def test_an_interrupted_sample_leaves_the_generator_usable(drafting: PreTrainedModel) -> None:
    with pytest.raises(KeyboardInterrupt):
        drafting.generate(IDS, max_new_tokens=NEW, do_sample=True, streamer=Interrupting(9))
    outs = []
    for draft in ({}, {"draft": None}):
        torch.manual_seed(4)
        outs.append(drafting.generate(IDS, max_new_tokens=NEW, do_sample=True, **draft))
    assert torch.equal(*outs)


# -- less memory for weights while a copy shares them


def shared_names(model: PreTrainedModel) -> set[str]:
    copy = model.lamina.decoder._drafts["self"][0].model
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    return {name for name in ours if ours[name] is theirs[name]}


def test_what_is_shared_follows_when_weights_go(written: Path, answer: list[int]) -> None:
    with opened(written, draft="self") as model:
        assert not model.lamina.plan.streams
        same(model, answer)
        before, table = shared_names(model), model.model.embed_tokens.weight
        budget = model.lamina.plan.budget
        model.lamina.give_room(budget.memory_bytes - model.lamina.plan.minimum_memory_bytes)
        assert model.lamina.plan.streams
        assert model.model.embed_tokens.weight is not table
        assert shared_names(model) == before
        same(model, answer)


def test_a_text_that_outgrows_the_plan(written: Path, answer: list[int]) -> None:
    """Beyond the context that was planned for weights are let go, in the middle of an answer."""
    with opened(written, draft="self", context=16) as model:
        engine = model.lamina.engine
        tight = dataclasses.replace(engine.plan.budget, activation_bytes=model.lamina._trace.activations(1))
        tight = dataclasses.replace(tight, memory_bytes=tight.reserved_bytes + engine.plan.resident_bytes + 30_000)
        engine.revise(budget=tight)
        before = shared_names(model)
        assert not model.lamina.plan.streams
        same(model, answer, 4 * NEW)
        assert model.lamina.plan.streams
        assert model.lamina.plan.budget.context_tokens > 16
        assert model.lamina.plan.budget.draft_bytes == tight.draft_bytes
        assert shared_names(model) == before
        assert model.lamina.stats.draft == "self"
        assert model.lamina.plan.as_dict()["draft"] == "self"
        same(model, answer)


# -- before a copy is written


def refused_with(kind: type[LaminaError], folder: Path, **options: Any) -> LaminaError:
    with pytest.raises(kind) as caught:
        AutoModel.from_pretrained(str(folder), **{"device": "cpu", "context": CONTEXT, **options})
    return caught.value


def test_too_little_memory_is_reported_before_a_copy_is_written(
    alone: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Splitter, "run", never)
        error = refused_with(BudgetError, alone, memory=1, draft="self")
        assert isinstance(error, BudgetError)
        least = error.minimum_bytes
        assert refused_with(BudgetError, alone, memory=least - 1, draft="self")
    assert [each.name for each in alone.parent.iterdir()] == ["model"]
    with opened(alone, memory=least, draft="self") as model:
        assert model.lamina.plan.minimum_memory_bytes == least
        same(model, answer)
    assert minimum_of(alone, draft="self") == least


def test_memory_is_enough_for_both_stores_or_neither_is_written(alone: Path) -> None:
    error = refused_with(BudgetError, alone, memory=1, draft="self", compression="8bit")
    assert [each.name for each in alone.parent.iterdir()] == ["model"]
    assert isinstance(error, BudgetError)
    with opened(alone, memory=error.minimum_bytes, draft="self", compression="8bit") as model:
        assert model.lamina.plan.budget.draft_bytes > 0


def test_memory_for_another_model_is_reported_before_its_store_is_written(
    written: Path, tmp_path: Path, answer: list[int]
) -> None:
    other = write(tmp_path / "other", seed=2, hidden_size=32)
    error = refused_with(BudgetError, written, memory=1, draft=str(other))
    assert [each.name for each in tmp_path.iterdir()] == ["other"]
    assert isinstance(error, BudgetError)
    with opened(written, memory=error.minimum_bytes, draft=str(other)) as model:
        assert (tmp_path / "other-8bit").is_dir()
        same(model, answer)


def test_a_full_disk_is_reported_before_a_copy_is_written(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    text = str(refused_with(WriteError, alone, draft="self"))
    assert "\n" not in text
    assert f"{alone}-4bit needs" in text and "1.00 kB are free there" in text
    assert "take draft='lookup' or draft='none', which write nothing" in text
    assert "--to" not in text
    assert [each.name for each in alone.parent.iterdir()] == ["model"]


def test_another_model_is_taken_as_it_is_where_its_store_has_no_room(
    written: Path, tmp_path: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(tmp_path / "other", seed=2, hidden_size=32)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with opened(written, draft=str(other)) as model:
        same(model, answer)
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_what_will_be_written_is_announced(alone: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "split":
            told.append(caplog.messages[-1] if caplog.messages else "")

    with caplog.at_level("INFO", "lamina"), opened(alone, draft="self", progress=progress):
        pass
    (line,) = caplog.messages
    assert told[0] == line  # before the first byte
    nbytes = sum(file.stat().st_size for file in Path(f"{alone}-4bit").glob("*.safetensors"))
    expected = f"writing a copy of the model in 4 bits for drafting: {alone}-4bit, {format_size(nbytes)}, about "
    assert line.startswith(expected) and line.endswith(" s")
    caplog.clear()
    with caplog.at_level("INFO", "lamina"), opened(alone, draft="self"):
        assert not caplog.messages


def test_a_copy_that_is_named_late_is_refused_before_it_is_written(
    alone: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(alone, memory=minimum_of(alone, draft=None), draft=None) as model:
        with pytest.raises(BudgetError, match="a draft") as caught:
            model.generate(IDS, max_new_tokens=NEW, do_sample=False, draft="self")
        assert [each.name for each in alone.parent.iterdir()] == ["model"]
        assert model.lamina.plan.budget.draft_bytes == 0
    with opened(alone, memory=caught.value.minimum_bytes, draft=None) as model:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
            with pytest.raises(WriteError, match="take draft='lookup'"):
                model.generate(IDS, max_new_tokens=NEW, do_sample=False, draft="self")
        assert [each.name for each in alone.parent.iterdir()] == ["model"]
        same(model, answer, draft="self")
        assert (alone.parent / "model-4bit").is_dir()


def never(*_: object) -> None:
    raise AssertionError("something is written")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "gemma3"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_copy_takes_as_much_as_was_planned(tmp_path: Path, family: str, tie: bool) -> None:
    write_tiny(family, tmp_path / "model", dtype=torch.bfloat16, tie=tie)
    options = {"context": CONTEXT, "device": "cpu", "draft": "self"}
    before = plan_model(str(tmp_path / "model"), **options)
    split(str(tmp_path / "model"), compression="4bit")
    after = plan_model(str(tmp_path / "model"), **options)
    assert before.budget.draft_bytes == after.budget.draft_bytes > 0
    assert before.minimum_memory_bytes == after.minimum_memory_bytes


# -- planned, not written


def test_a_plan_with_a_copy_that_is_not_written(alone: Path) -> None:
    plans = {draft: plan_model(str(alone), context=CONTEXT, device="cpu", draft=draft) for draft in ("none", "self")}
    assert plans["none"].budget.draft_bytes == 0
    assert plans["self"].budget.draft_bytes > 0
    assert [each.name for each in alone.parent.iterdir()] == ["model"]
    with opened(alone, draft="self") as model:
        assert model.lamina.plan.budget.draft_bytes == plans["self"].budget.draft_bytes
