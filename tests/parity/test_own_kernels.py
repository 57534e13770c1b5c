"""With Lamina's own products a token has the same bits wherever its weights lie and whatever it is verified with.

In fp32 they are within 1e-5 of plain transformers, with the same tokens, for every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, input_ids
from helpers.judge import CONTEXT, minimum_of, steady
from helpers.tiny import write_llama
from lamina import AutoModel, RequestError
from lamina.codec import native
from lamina.hf.decoding.exact_rows import covers
from lamina.tensors.own_products import own_products
from parity.test_one_row import LENGTHS, singly_and_at_once, tiny

pytestmark = pytest.mark.skipif(not native.available(), reason=native.missing())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NEW = 8


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fp32_is_within_rounding_of_plain_transformers(family: str) -> None:
    model = tiny(family, torch.float32)
    ids = input_ids(model.config, length=9)

    def answer() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            return model(ids).logits, tokens

    plain, tokens = answer()
    with own_products(True):
        own, own_tokens = answer()
    assert torch.equal(tokens, own_tokens)
    if (own - plain).norm() > 1e-5 * plain.norm():  # then plain transformers is the one that is further off
        with torch.no_grad():
            exact = tiny(family, torch.float64)(ids).logits
        assert (own - exact).norm() <= (plain - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral", "gpt_oss"])
def test_tokens_that_are_verified_at_once_have_the_bits_of_single_ones(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    if (why := covers(model)) is not None:
        pytest.skip(why)
    with own_products(True):
        for count, prompt in LENGTHS:
            singly, at_once = singly_and_at_once(model, count, prompt, rows=count)
            assert torch.equal(singly, at_once)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    write_llama(made)
    return made


def answers(folder: Path, memory: int | None, **more: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    given: dict[str, Any] = {} if memory is None else {"memory": memory}
    with AutoModel.from_pretrained(
        str(folder), device="cpu", context=CONTEXT, kernels="lamina", **given, **more
    ) as model:
        ids = torch.arange(5, 17)[None]
        with torch.no_grad():
            logits = model(ids).logits
        return logits, model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0), model.lamina.stats


def test_where_the_weights_lie_changes_no_bit(folder: Path) -> None:
    whole = answers(folder, None, draft=None)
    streamed = answers(folder, minimum_of(folder), draft=None)
    assert torch.equal(whole[0], streamed[0]) and torch.equal(whole[1], streamed[1])
    assert streamed[2].bytes_read > 0


def test_a_draft_that_is_verified_exactly_changes_no_token(folder: Path) -> None:
    plain, drafted = answers(folder, None, draft=None), answers(folder, None, draft="lookup", exact=True)
    assert torch.equal(plain[1], drafted[1])
    assert drafted[2].drafted_tokens > 0


def test_kernels_are_asked_for_by_name(folder: Path) -> None:
    with pytest.raises(RequestError, match="kernels='cuda' is none of auto, lamina, torch"):
        AutoModel.from_pretrained(str(folder), kernels="cuda")
    with AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft=None) as model:
        assert not model.lamina.own_kernels
    with native.switched_off(), pytest.warns(UserWarning, match="products are made by torch's kernels: switched off"):
        AutoModel.from_pretrained(
            str(folder), device="cpu", context=CONTEXT, draft=None, kernels="lamina"
        ).lamina.close()
