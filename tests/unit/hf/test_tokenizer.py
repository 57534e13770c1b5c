"""A tokenizer that is loaded when somebody uses it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.tiny import words
from lamina import RequestError
from lamina.hf.tokenizer import Lazy, load_processor, load_tokenizer, tokenizer_bytes
from lamina.hf.trace import Trace
from lamina.plan.schedule import Call
from lamina.runtime.budget import make_budget


def _tokenizer() -> PreTrainedTokenizerFast:
    return words(["<pad>", "<unk>", "hello", "world"], "<unk>", pad_token="<pad>")


@pytest.fixture
def lazy() -> Any:
    """A tokenizer, the model that has it and how often it was loaded."""
    model = nn.Module()
    loads = []

    def load() -> PreTrainedTokenizerFast:
        loads.append(1)
        return _tokenizer()

    object.__setattr__(model, "tokenizer", Lazy(model, load))  # type: ignore[arg-type]
    return model, loads


def test_nothing_is_loaded_before_it_is_used(lazy: Any) -> None:
    model, loads = lazy
    assert repr(model.tokenizer) == "<tokenizer, not loaded yet>"
    assert not loads


def test_use_loads_once_and_the_model_has_the_real_one_from_then_on(lazy: Any) -> None:
    model, loads = lazy
    held = model.tokenizer
    assert held("hello world")["input_ids"] == [2, 3]
    assert held.decode([3]) == "world"
    assert type(model.tokenizer) is PreTrainedTokenizerFast
    assert repr(held) == repr(model.tokenizer)
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (len, 4),
        (lambda t: isinstance(t, PreTrainedTokenizerBase), True),
        (lambda t: t.pad_token_id, 0),
        (lambda t: t("hello", return_tensors="pt")["input_ids"].tolist(), [[2]]),
        (lambda t: t.convert_tokens_to_ids("world"), 3),
    ],
)
def test_it_does_what_the_real_one_does(use: Any, wanted: object, lazy: Any) -> None:
    assert use(lazy[0].tokenizer) == wanted


def test_a_processor_is_loaded_when_it_is_used_and_let_go_as_well(lazy: Any) -> None:
    model, loads = lazy
    object.__setattr__(model, "processor", Lazy(model, model.tokenizer.real, "processor"))
    held = model.processor
    assert repr(held) == "<processor, not loaded yet>" and not loads
    assert held("hello")["input_ids"] == [2]
    assert model.processor is model.tokenizer and len(loads) == 1
    held.forget()
    assert model.processor is held
    assert type(model.tokenizer) is PreTrainedTokenizerFast


def test_a_folder_without_a_processor_gives_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    assert load_processor(str(tmp_path), False, lambda: tokenizer) is tokenizer
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_processor(str(tmp_path), True, lambda: tokenizer) is tokenizer


@pytest.mark.parametrize("written", ["{", '{"processor_class": "NoneProcessor"}', "[]"])
def test_a_damaged_processor_says_so_in_one_line(written: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(written)
    with pytest.raises(RequestError, match=r"no usable processor in .*; model.tokenizer takes text") as caught:
        load_processor(str(tmp_path), False, _tokenizer)
    assert "\n" not in str(caught.value)


def test_a_processor_that_needs_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("\nVideos require the Torchvision library. Check out " + "the instructions " * 20)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(RequestError) as caught:
        load_processor(str(tmp_path), False, _tokenizer)
    said = f"no usable processor in {tmp_path}: Videos require the Torchvision library; model.tokenizer takes text"
    assert str(caught.value) == said


def test_an_attribute_that_is_set_is_set_on_the_real_one(lazy: Any) -> None:
    model, _ = lazy
    held = model.tokenizer
    held.padding_side = "left"
    assert model.tokenizer.padding_side == held.padding_side == "left"


def test_it_outlives_its_model(lazy: Any) -> None:
    held = lazy[0].tokenizer
    made = Lazy(nn.Module(), _tokenizer)  # type: ignore[arg-type]
    assert held("hello")["input_ids"] == made("hello")["input_ids"] == [2]


def test_loading_from_a_folder(tmp_path: Path) -> None:
    _tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), False)("world")["input_ids"] == [3]


def test_a_folder_without_one_says_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no usable tokenizer in .* pass token ids instead") as caught:
        load_tokenizer(str(tmp_path), False)
    assert "\n" not in str(caught.value)


def test_a_damaged_one_says_so_in_one_line(tmp_path: Path) -> None:
    _tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path), False)
    assert "\n" not in str(caught.value)


def test_a_large_vocabulary_has_room_of_its_own(tmp_path: Path) -> None:
    assert tokenizer_bytes(str(tmp_path)) == 0
    (tmp_path / "vocab.json").write_bytes(bytes(3_000))
    (tmp_path / "merges.txt").write_bytes(bytes(1_000))
    assert tokenizer_bytes(str(tmp_path)) == 15 * 4_000
    (tmp_path / "tokenizer.json").write_bytes(bytes(10_000))
    assert tokenizer_bytes(str(tmp_path)) == 15 * 10_000

    def overhead(nbytes: int) -> int:
        trace = Trace(Call(""), {}, activation_bytes={8: 8, 16: 16, 32: 32}, cache_bytes={8: 8, 16: 16, 32: 32})
        return make_budget("4GB", None, torch.device("cpu"), trace, 256, 0, nbytes).overhead_bytes

    assert overhead(190_000_000) == overhead(0) + 190_000_000


def test_a_closed_model_lets_its_tokenizer_go_and_loads_it_again_where_it_is_used(lazy: Any) -> None:
    model, loads = lazy
    first = model.tokenizer
    first.forget()
    assert not loads
    first("hello")
    real = weakref.ref(model.tokenizer)
    assert isinstance(real(), PreTrainedTokenizerFast)
    first.forget()
    gc.collect()
    assert real() is None
    assert model.tokenizer("hello world")["input_ids"] == [2, 3]
    assert len(loads) == 2
    model.tokenizer = own = _tokenizer()
    first.forget()
    assert model.tokenizer is own
