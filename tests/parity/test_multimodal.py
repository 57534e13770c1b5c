"""What takes images or sound, encoders with decoders, classifiers: as plain transformers says, bit for bit.

At the smallest budget everything streams, towers and encoders too, and a pass over text reads nothing of a tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    KyutaiSpeechToTextConfig,
    KyutaiSpeechToTextForConditionalGeneration,
    PreTrainedModel,
)

from helpers.always import Always
from helpers.families import input_ids
from helpers.judge import minimum_of, reads_on_demand, steady, streamed_model, traced_once
from helpers.multimodal import CASES, TEXT, Inputs, class_of, text_of, whole_of, write_case
from helpers.wavering import Wavering
from lamina.plan.plan import Plan
from lamina.speculative.decoder import MOST
from lamina.stream.readers import Readers

NEW_TOKENS = 4
TOWERS = [name for name, case in CASES.items() if case.marks]
MASKED = {"BartForConditionalGeneration", "MarianMTModel"}  # their decoders make a mask, and ask whether it is full
ONCE = [name for name in TOWERS if name != "MllamaForConditionalGeneration"]  # each of its tokens looks at the image
WITH_BRANCHES = [name for name, case in CASES.items() if case.parts]


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():
        yield


@dataclass(frozen=True)
class Said:
    """What plain transformers says about a checkpoint: each kind of answer by its name."""

    name: str
    folder: Path
    answers: dict[str, torch.Tensor]
    minimum: int


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp(request.param)
    write_case(request.param, folder)
    plain = class_of(request.param).from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()
    found = {kind: answer(plain, request.param, kind) for kind in kinds(request.param)}
    if CASES[request.param].more is not None:
        assert not torch.equal(first(plain, whole_of(request.param, seed=1)), found["whole"]), "it does not show"
    return Said(request.param, folder, found, minimum_of(folder))


def kinds(name: str) -> list[str]:
    """What is asked of a model, in this order."""
    case = CASES[name]
    text = [] if case.encodes and case.more else ["text"]
    return [*text, *(["whole"] if case.more else []), *(["generate"] if class_of(name).can_generate() else [])]


def first(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The first output: logits, or hidden states."""
    with torch.no_grad():
        outputs = model(**inputs)
    found: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found


def answer(model: PreTrainedModel, name: str, kind: str) -> torch.Tensor:
    if kind != "generate":
        return first(model, text_of(name) if kind == "text" else whole_of(name))
    inputs = {key: value for key, value in whole_of(name).items() if key != "decoder_input_ids"}
    tokens: Any = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens


@contextmanager
def noted_reads() -> Iterator[list[Any]]:
    """What is asked of the readers for a place in the ring, unit by unit, as it comes."""
    seen: list[Any] = []
    submit = Readers.submit

    def noted(readers: Readers, reads: Any, area: Any, *place: int, urgent: bool = False) -> Any:
        if place and not urgent:
            seen.append(reads)
        return submit(readers, reads, area, *place, urgent=urgent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readers, "submit", noted)
        yield seen


def of_branches(plan: Plan) -> list[Any]:
    """What it asks for to have each unit of a branch once."""
    return [plan.items[index].layout.reads for branch in plan.branches for index in branch]


def assert_equal(said: Said, model: PreTrainedModel, kind: str) -> None:
    found, wanted = answer(model, said.name, kind), said.answers[kind]
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found, wanted), f"{kind} is off by {(found - wanted).abs().max().item():.3g}"


@pytest.mark.parametrize("said", CASES, indirect=True)
def test_at_the_minimum(said: Said) -> None:
    with reads_on_demand() as demanded:
        model = streamed_model(said.folder, said.minimum)
        with model.lamina:
            for kind in said.answers:
                assert_equal(said, model, kind)
    plan = model.lamina.plan
    assert isinstance(model, class_of(said.name))
    assert plan.streams and plan.traced
    assert not plan.fallbacks or said.name in MASKED
    parts, late = CASES[said.name].parts, CASES[said.name].unordered
    assert all(name.startswith(parts) and name.endswith(late) for name in demanded), set(demanded)


@pytest.mark.parametrize("said", WITH_BRANCHES, indirect=True)
def test_parts_that_a_pass_over_text_does_not_go_through_are_branches(said: Said) -> None:
    with streamed_model(said.folder, said.minimum).lamina as lamina:
        plan = lamina.plan
    parts = CASES[said.name].parts
    streamed = {part.weight for branch in plan.branches for index in branch for part in plan.items[index].parts}
    in_steps = {part.weight for index in plan.steps for part in plan.items[index].parts}
    assert all(any(name.startswith(part) for name in streamed) for part in parts), streamed
    assert all(name.startswith(parts) for name in streamed), streamed
    assert not streamed & in_steps and not streamed & plan.resident


@pytest.mark.parametrize("said", TOWERS, indirect=True)
def test_a_pass_over_text_reads_no_byte_of_a_tower(said: Said) -> None:
    with noted_reads() as seen:
        model = streamed_model(said.folder, said.minimum)
        with model.lamina as lamina:
            plan = lamina.plan
            for _ in range(2):
                assert_equal(said, model, "text")
            assert seen and not any(reads in seen for reads in of_branches(plan))
            of_text = lamina.stats.bytes_read
            assert_equal(said, model, "whole")
            assert all(reads in seen for reads in of_branches(plan))
            read = sum(plan.items[i].layout.read_bytes for branch in plan.branches for i in branch)
            assert lamina.stats.bytes_read - of_text >= read
            seen.clear()
            assert_equal(said, model, "text")  # what the pass before left has no part in it
            assert not any(reads in seen for reads in of_branches(plan))


@pytest.mark.parametrize("said", ONCE, indirect=True)
def test_a_tower_is_gone_through_once_for_an_answer(said: Said) -> None:
    """Every token after the first is a pass over text."""
    model = streamed_model(said.folder, said.minimum)
    with model.lamina as lamina:
        plan = lamina.plan
        with noted_reads() as seen:
            assert_equal(said, model, "generate")
    assert {seen.count(reads) for reads in of_branches(plan)} == {1}
    assert all(seen.count(plan.items[index].layout.reads) >= 2 for index in plan.steps)  # drafts save passes


@pytest.mark.parametrize("said", CASES, indirect=True)
def test_where_all_of_it_fits(said: Said) -> None:
    with noted_reads() as seen:
        model = streamed_model(said.folder, said.minimum + 200_000_000)
        with model.lamina as lamina:
            assert not lamina.plan.streams and not lamina.plan.branches
            seen.clear()  # what was read to be there
            for kind in said.answers:
                assert_equal(said, model, kind)
    assert not seen


@pytest.mark.parametrize("said", ["LlavaForConditionalGeneration", "T5ForConditionalGeneration"], indirect=True)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_between(said: Said, share: float) -> None:
    nbytes = sum(file.stat().st_size for file in said.folder.glob("*.safetensors"))
    model = streamed_model(said.folder, said.minimum + int(share * nbytes))
    with model.lamina:
        for kind in said.answers:
            assert_equal(said, model, kind)


@pytest.mark.parametrize("said", ["LlavaForConditionalGeneration"], indirect=True)
def test_after_a_pass_that_failed_in_a_tower(said: Said) -> None:
    model = streamed_model(said.folder, said.minimum)
    with model.lamina:
        block = model.model.vision_tower.encoder.layers[1]
        hook = block.register_forward_pre_hook(_raise)
        with pytest.raises(RuntimeError, match="in the tower"):
            answer(model, said.name, "whole")
        hook.remove()
        for kind in ("text", "whole", "text"):
            assert_equal(said, model, kind)


def _raise(*_: Any) -> None:
    raise RuntimeError("in the tower")


def test_tokens_with_a_sound_beside_each(tmp_path: Path) -> None:
    """Kyutai's: what goes in are a token and an id of each codebook, in a third dimension."""
    codec = {
        "model_type": "mimi", "num_quantizers": 4, "hidden_size": 16, "num_filters": 8, "upsampling_ratios": [8, 4],
        "codebook_size": 16, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "upsample_groups": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4,
        "use_cache": False,
    }  # fmt: skip
    config = KyutaiSpeechToTextConfig(
        codebook_vocab_size=17, vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=128,
        num_codebooks=4, frame_size=64, audio_bos_token_id=16, audio_pad_token_id=16, codec_config=codec,
        max_position_embeddings=512, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        KyutaiSpeechToTextForConditionalGeneration(config).save_pretrained(tmp_path)
    plain = KyutaiSpeechToTextForConditionalGeneration.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 16, (1, 7, 5), generator=generator)
    heard = {"input_ids": torch.tensor([[1]]), "input_values": torch.randn(1, 1, 64 * 12, generator=generator)}
    with streamed_model(tmp_path, minimum_of(tmp_path)) as model:
        assert model.lamina.plan.streams and model.lamina.plan.traced and not model.lamina.plan.fallbacks
        assert torch.equal(first(model, {"input_ids": ids}), first(plain, {"input_ids": ids}))
        answers = [each.generate(**heard, max_new_tokens=8, do_sample=False) for each in (model, plain)]
    assert torch.equal(*answers)


def test_a_draft_where_each_pass_hands_the_image_on(tmp_path: Path) -> None:
    """Idefics asks the outputs of a pass for the image of the next one: there are none yet for what is verified."""
    vision = {"embed_dim": 64, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = IdeficsConfig(
        vocab_size=256, additional_vocab_size=2, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, cross_layer_interval=2, use_resampler=False, alpha_initializer="ones",
        vision_config={**vision, "intermediate_size": 96}, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = IdeficsForVisionText2Text(config)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        made.save_pretrained(tmp_path)
    ids = input_ids(config, TEXT)
    seen = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_attention_mask": torch.ones(1, TEXT, 1),
        "pixel_values": torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    asked: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    plain = IdeficsForVisionText2Text.from_pretrained(tmp_path).eval()
    wanted = plain.generate(**seen, **asked)
    with streamed_model(tmp_path, minimum_of(tmp_path)) as model:
        assert model.lamina.plan.streams
        model.lamina.decoder._drafts["lookup"] = Wavering(wanted[0].tolist()), Always(MOST, None, 0.0, must=True)
        assert torch.equal(model.generate(**seen, **asked), wanted)
        assert 0 < model.lamina.stats.accepted_tokens < model.lamina.stats.drafted_tokens
