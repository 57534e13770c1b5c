"""Families with a draft: what comes out is what plain transformers gives, through every kind of cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.always import Always
from helpers.families import input_ids, tiny_config, write_tiny
from helpers.judge import minimum_of, plain_model, steady
from helpers.wavering import Wavering
from lamina import AutoModel
from lamina.speculative.decoder import MOST

# full attention, windows shorter than the text, alibi, learnt positions, latent attention, experts, shared caches
FAMILIES = """llama gemma2 gemma3_text gemma3n_text mistral gpt_oss olmo3 cohere2 bloom falcon gpt2 opt phi3
    deepseek_v3 mixtral qwen3_moe llama4_text dbrx gpt_bigcode lfm2 smollm3""".split()
STATEFUL = "mamba2 jamba falcon_h1 qwen3_next rwkv xlstm zamba2 bamba minimax".split()
COPIED = "llama gemma2 gpt_oss gpt2 falcon deepseek_v3 bloom".split()
NEW = 26


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def known(families: list[str]) -> list[str]:
    """Those that this version of transformers can build."""
    found = []
    for family in families:
        try:
            tiny_config(family)
        except (KeyError, ValueError):
            continue
        found.append(family)
    return found


def drafted(model: PreTrainedModel, ids: torch.Tensor, answer: torch.Tensor, **asked: Any) -> torch.Tensor:
    model.lamina.decoder._drafts["oracle"] = Wavering(answer[0].tolist()), Always(MOST, None, 0.0, must=True)
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, draft="oracle", **asked)


@pytest.mark.parametrize("family", known(FAMILIES))
def test_as_without_a_draft(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    plain = plain_model(tmp_path, family)
    ids = input_ids(plain.config, 21)
    answer = plain.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    memory = minimum_of(tmp_path)
    model = AutoModel.from_pretrained(str(tmp_path), memory=memory, context=64, draft="lookup")
    with model.lamina:
        before = model.lamina.stats.passes
        assert torch.equal(drafted(model, ids, answer), answer)
        assert model.lamina.stats.draft_reason == "asked for"
        assert model.lamina.stats.passes - before < NEW


@pytest.mark.parametrize("family", known(STATEFUL))
def test_what_cannot_be_taken_back_is_not_drafted(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    plain = plain_model(tmp_path, family)
    ids = input_ids(plain.config, 9)
    answer = plain.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    model = AutoModel.from_pretrained(str(tmp_path), draft="lookup")
    with model.lamina:
        assert torch.equal(drafted(model, ids, answer), answer)
        stats = model.lamina.stats
        assert "forget what was not accepted" in stats.draft_reason
        assert stats.drafted_tokens == 0


@pytest.mark.parametrize("family", known(COPIED))
def test_a_copy_of_the_model_drafts(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path / "model")
    plain = plain_model(tmp_path / "model", family)
    ids = input_ids(plain.config, 21)
    answer = plain.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    model = AutoModel.from_pretrained(str(tmp_path / "model"), context=64, draft="self")
    with model.lamina:
        copy, _ = model.lamina.decoder._drafts["self"]
        model.lamina.decoder._drafts["self"] = copy, Always(MOST, None, 0.0, must=True)
        out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, answer)
        assert model.lamina.stats.accepted_tokens > 0
