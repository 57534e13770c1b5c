"""Families whose processor has a part for videos read pictures without torchvision, which only that part needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from lamina.hf.internals import without_video
from lamina.hf.tokenizer import load_processor, load_tokenizer

Image = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed: nothing is missing"),
]
MARKS = ["<|image_pad|>", "<|video_pad|>"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Qwen2-VL's, with a few words."""
    words = ["<unk>", *MARKS, "what", "is", "this"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(MARKS)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(tmp_path)
    files = {
        "config.json": {"model_type": "qwen2_vl"},
        "processor_config.json": {"processor_class": "Qwen2VLProcessor"},
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14},
    }
    for name, fields in files.items():
        (tmp_path / name).write_text(json.dumps(fields))
    return str(tmp_path)


def test_a_picture_is_read_and_a_video_is_refused(folder: str) -> None:
    processor = load_processor(folder, False, lambda: load_tokenizer(folder, False))
    picture = Image.new("RGB", (56, 56))
    inputs = processor(images=[picture], text=[f"{MARKS[0]} what is this"], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [1, 1, 1, 1, 3, 4, 5]
    assert inputs["pixel_values"].shape == (16, 1176)
    with pytest.raises(ImportError, match="torchvision"):
        processor.video_processor([picture])


def test_transformers_is_as_before_afterwards() -> None:
    before = AutoVideoProcessor.__dict__["from_pretrained"], ProcessorMixin.check_argument_for_proper_class
    with without_video():
        assert AutoVideoProcessor.__dict__["from_pretrained"] is not before[0]
    after = AutoVideoProcessor.__dict__["from_pretrained"], ProcessorMixin.check_argument_for_proper_class
    assert after == before
