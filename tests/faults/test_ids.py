"""Ids that are no row of their table: one clear error before anything is read, the same for every encoding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from helpers.families import VOCAB, tiny_model, write_tiny
from helpers.gguf_files import write_model
from helpers.judge import CONTEXT, minimum_of, streamed_model
from lamina import AutoModel, LaminaError, RequestError, TokenError

pytestmark = pytest.mark.usefixtures("steadily")

ENCODINGS = ("F32", "cast", "tied", "lossless", "4bit", "gguf")
ROOM = 100_000  # bytes, for a table that is written to
EXTREMES = (-1, -100, -(2**63), 999_999, 2**31, 2**63 - 1)


@pytest.fixture(scope="module", params=ENCODINGS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedModel]:
    """A model with the least memory, its tables in one of the encodings."""
    kind, folder = request.param, tmp_path_factory.mktemp("ids") / "model"
    options: dict[str, Any] = {"draft": None}
    if kind == "gguf":
        folder = write_model(folder, "llama", ("Q8_0", "Q4_K"))
    else:
        dtype = torch.float32 if kind == "F32" else torch.bfloat16
        write_tiny("llama", folder, dtype=dtype, tie=kind in ("tied", "4bit"))
    if kind == "cast":
        options["dtype"] = torch.float32
    if kind in ("lossless", "4bit"):
        options["compression"] = kind
    model = streamed_model(folder, minimum_of(folder, **options), **options)
    with model.lamina:
        assert model.lamina.plan.streams
        yield model


@pytest.fixture
def least(tmp_path: Path) -> Iterator[PreTrainedModel]:
    write_tiny("llama", tmp_path, tie=False)
    model = streamed_model(tmp_path, minimum_of(tmp_path, draft=None) + ROOM, draft=None)
    with model.lamina:
        assert model.lamina.plan.gathered
        yield model


def refused(model: PreTrainedModel, ids: torch.Tensor, bad: int, position: list[int]) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TokenError) as caught:
        patch.setattr(model.lamina.engine.readers, "read", None)  # what the stream reads ahead is submitted
        model.get_input_embeddings()(ids)
    assert isinstance(caught.value, IndexError) and isinstance(caught.value, LaminaError)
    text = str(caught.value)
    assert text.startswith(f"id {bad} at position {position} is no row of ") and "\n" not in text
    assert f"{rows} of them" in text and "tokenizer" in text and "resize_token_embeddings" in text


def test_an_id_outside_of_the_vocabulary_is_refused_wherever_it_is(loaded: PreTrainedModel) -> None:
    rng = random.Random(0)
    rows = loaded.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        wanted = loaded(torch.tensor([[5, rows - 1, 0]])).logits
    for bad in (rows, rows + 1, *EXTREMES, *(rng.randrange(rows, 4 * rows) for _ in range(3))):
        ids = torch.tensor([[rng.randrange(rows) for _ in range(rng.randint(1, 6))]])
        ids = ids.repeat(rng.randint(1, 3), 1)
        position = [rng.randrange(size) for size in ids.shape]
        ids[tuple(position)] = bad
        refused(loaded, ids, bad, position)
        if -(2**31) <= bad < 2**31:
            refused(loaded, ids.int(), bad, position)
        with pytest.raises(TokenError, match=f"id {bad} at position"):
            loaded(ids)
    with pytest.raises(TokenError):
        loaded.generate(torch.tensor([[5, rows]]), max_new_tokens=2, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([[5, rows - 1, 0]])).logits, wanted)


def test_lookups_without_ids_and_with_other_numbers(loaded: PreTrainedModel) -> None:
    table = loaded.get_input_embeddings()
    assert table(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, table.weight.shape[1])
    with pytest.raises(RequestError, match=r"torch\.float32 of shape \(1, 2\): ids are torch\.int64"):
        table(torch.zeros(1, 2))


def test_a_text_longer_than_a_table_of_positions_is_refused(tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path)
    model = streamed_model(tmp_path, minimum_of(tmp_path, draft=None), draft=None)
    assert any("wpe" in name for name in model.lamina.plan.gathered)
    with (
        model.lamina,
        pytest.raises(TokenError, match=r"id 512 .* transformer\.wpe\.weight.*than the model has positions"),
    ):
        model(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 512]]))


def test_a_written_table_and_one_that_is_all_in_memory_refuse_alike(least: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        least.get_input_embeddings().weight[3] = 0.5
    resident = AutoModel.from_pretrained(str(tmp_path), device="cpu", context=CONTEXT, draft=None)
    with resident.lamina:
        assert not resident.lamina.plan.streams
        for model in (least, resident):
            for bad in (VOCAB, -1, 999_999):
                with pytest.raises(TokenError, match=rf"id {bad} at position \[0, 1\] is no row of .* {VOCAB} of them"):
                    model(torch.tensor([[5, bad]]))


def test_an_index_error_of_somebody_else_stays_what_it_is(least: PreTrainedModel) -> None:
    def fail(*_: object) -> None:
        raise IndexError("theirs")

    handle = least.model.layers[1].register_forward_hook(fail)
    with pytest.raises(IndexError, match="theirs") as caught:
        least(torch.tensor([[5, 6]]))
    assert not isinstance(caught.value, LaminaError)
    handle.remove()


def test_indexing_is_torchs_own(least: PreTrainedModel) -> None:
    weight, plain = least.lm_head.weight, tiny_model("llama", tie=False).lm_head.weight
    assert torch.equal(weight[-VOCAB], plain[-VOCAB])
    assert torch.equal(weight[[-1, 3]], plain[[-1, 3]])
    for index in (VOCAB, -VOCAB - 1, torch.tensor([VOCAB]), (0, 64), [0, -VOCAB - 1]):
        for each in (weight, plain):
            with pytest.raises(IndexError):
                each[index]


def test_one_request_of_a_batch_fails_alone(least: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    given = least.generate_batch([[5, 6, 7], [5, VOCAB, 7], [5, -1]], generation_config=config)
    right, large, negative = (given[name] for name in sorted(given))
    assert len(right.generated_tokens) == 3 and right.error is None
    assert f"id {VOCAB} at position [1]" in str(large.error) and "id -1 at position [1]" in str(negative.error)


def test_a_draft_whose_table_is_shorter_proposes_nothing_of_what_it_lacks() -> None:
    from lamina.speculative.model_draft import ModelDraft

    draft = ModelDraft("small", tiny_model("llama"))
    assert "has no token 256" in str(draft.begin([5, VOCAB], None))
    assert draft.begin([5, 6], None) is None
    pick = lambda position, logits: (int(logits.argmax()), 1.0)  # noqa: E731
    assert not draft.propose([5, 6, VOCAB], 4, lambda confidence: True, pick).tokens
    assert draft.propose([5, 6, 7], 4, lambda confidence: True, pick).tokens
