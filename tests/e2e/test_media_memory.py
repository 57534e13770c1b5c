"""What an image takes beyond what was planned for: fewer weights stay, or one line says how much is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.multimodal import whole_of, write_case
from lamina import AutoModel, BudgetError
from lamina.hf.sizing import Sizing, has_media

LLAVA = "LlavaForConditionalGeneration"
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    write_case(LLAVA, made)
    return made


def test_an_image_keeps_the_room_of_the_tokens_that_come_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft=None) as model:
        planned = model.lamina.plan.budget
        nbytes = planned.activation_bytes + (1 << 20)
        monkeypatch.setattr(Sizing, "activations", lambda *_: nbytes)
        model.generate(**whole_of(LLAVA), max_new_tokens=2, do_sample=False)
        grown = model.lamina.plan.budget
        assert (grown.activation_bytes, grown.kv_cache_bytes, grown.context_tokens) == (
            nbytes,
            planned.kv_cache_bytes,
            planned.context_tokens,
        )


def test_an_image_that_there_is_no_room_for_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AutoModel.from_pretrained(str(folder), memory="3GB", device="cpu", context=CONTEXT, draft=None) as model:
        planned = model.lamina.plan.budget
        with monkeypatch.context() as patch:
            patch.setattr(Sizing, "activations", lambda *_: 10**10)
            with pytest.raises(BudgetError, match=r"10\.0 GB of it are for the images or sound") as caught:
                model.generate(**whole_of(LLAVA), max_new_tokens=2, do_sample=False)
        assert caught.value.minimum_bytes > 10**10
        assert f"context of {CONTEXT} tokens" in str(caught.value)
        assert model.lamina.plan.budget == planned
        model.generate(**whole_of(LLAVA), max_new_tokens=2, do_sample=False)


def test_an_image_that_is_not_named_counts_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = whole_of(LLAVA)
    with AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft=None) as model:
        seen: list[bool] = []
        monkeypatch.setattr(Sizing, "activations", lambda _, kwargs, tower=None: seen.append(has_media(kwargs)) or 0)
        model(inputs["input_ids"], inputs["pixel_values"])
    assert seen[0]
