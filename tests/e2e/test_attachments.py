"""`lamina run --image` and `--audio` of real tiny models: the tokens of plain transformers on the same inputs."""

from __future__ import annotations

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from helpers.judge import CONTEXT, minimum_of, streamed_model
from helpers.tiny import BYTES, words, write_llama
from lamina.cli.main import main
from unit.cli.test_commands import Result, Run

pytestmark = pytest.mark.usefixtures("steadily")

Image = pytest.importorskip("PIL.Image")

NEW = 12
WORDS = [*"<pad> <unk> <image> what is this user assistant :".split(), *(f"w{index}" for index in range(23))]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SEED = 0  # of weights with which one picture and two give other answers
TRANSCRIPT = "<|endoftext|> <|startoftranscript|> <|en|> <|transcribe|> <|translate|> <|notimestamps|> <|startofprev|>"


def spread(model: PreTrainedModel, folder: Path) -> None:
    """Save it with weights that tell their inputs apart."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def write_llava(folder: Path, template: str | None) -> Path:
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=6
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=2, image_seq_length=25)
    torch.manual_seed(SEED)  # the embedding of the class is made by the model
    spread(LlavaForConditionalGeneration(config), folder)
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    LlavaProcessor(
        kind(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        words(WORDS, "<unk>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}),
        patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"), None)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("talking"), TEMPLATE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), dtype=np.uint8)
    paths = [folder / "a.png", folder / "b.jpg"]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def answer(folder: Path, inputs: Any, **more: Any) -> list[int]:
    """The new tokens of plain transformers."""
    kind = WhisperForConditionalGeneration if "input_features" in inputs else LlavaForConditionalGeneration
    out = kind.from_pretrained(folder).eval().generate(**inputs, **more, max_new_tokens=NEW, do_sample=False)
    return out[0][inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()


def tokens(result: Result) -> list[int]:
    assert result.code == 0, result.err
    return list(json.loads(result.out)["tokens"])


def asked(folder: Path, *more: str) -> list[str]:
    return ["run", str(folder), *more, "-n", str(NEW), "--device", "cpu", "--json", "--context", str(CONTEXT)]


@pytest.mark.parametrize("streamed", [False, True])
def test_pictures_and_a_bare_prompt(streamed: bool, run: Run, llava: Path, pictures: list[Path]) -> None:
    processor = transformers.AutoProcessor.from_pretrained(llava)
    images = [Image.open(path) for path in pictures]
    told = answer(llava, processor(images=images, text="<image><image>what is this", return_tensors="pt"))
    other = answer(llava, processor(images=images[:1], text="<image>what is this", return_tensors="pt"))
    assert told != other
    memory = ["--memory", str(minimum_of(llava))] if streamed else []
    given = [word for path in pictures for word in ("--image", str(path))]
    assert tokens(run(*asked(llava, "what is this", *given, *memory))) == told
    assert tokens(run(*asked(llava, "what is this", *given[:2], *memory))) == other


def test_a_picture_comes_in_the_type_of_the_weights(run: Run, llava: Path, pictures: list[Path]) -> None:
    processor = transformers.AutoProcessor.from_pretrained(llava)
    inputs = processor(images=Image.open(pictures[0]), text="<image>what is this", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    plain = LlavaForConditionalGeneration.from_pretrained(llava, dtype="bfloat16").eval()
    out = plain.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    given = ["--image", str(pictures[0]), "--dtype", "bfloat16"]
    assert tokens(run(*asked(llava, "what is this", *given))) == out.tolist()


def test_a_picture_is_asked_about_with_the_chat_template(run: Run, talking: Path, pictures: list[Path]) -> None:
    processor = transformers.AutoProcessor.from_pretrained(talking)
    inputs = processor(
        images=Image.open(pictures[0]), text="user : <image> what is this assistant :", return_tensors="pt"
    )
    assert tokens(run(*asked(talking, "what is this", "--image", str(pictures[0])))) == answer(talking, inputs)


def test_a_conversation_keeps_its_picture(
    talking: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = transformers.AutoProcessor.from_pretrained(talking)
    said: list[str] = []
    for text in ("user : <image> what is", "user : this"):
        said.append(f"{text} assistant :")
        inputs = processor(images=Image.open(pictures[1]), text=" ".join(said), return_tensors="pt")
        said.append(processor.decode(answer(talking, inputs), skip_special_tokens=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {pictures[1]}\nwhat is\nthis\n/reset\nthis\n"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(talking), "-n", str(NEW), "--device", "cpu", "--quiet"])
    assert not ended.value.code
    assert capsys.readouterr().out.split("\n")[:2] == [f" {said[1]}", f" {said[3]}"]


def test_a_processor_is_the_models_own_and_shares_its_tokenizer(llava: Path) -> None:
    model = streamed_model(llava, minimum_of(llava))
    with model.lamina:
        assert repr(model.processor) == "<processor, not loaded yet>"
        assert model.processor.image_token == "<image>"
        assert type(model.processor) is LlavaProcessor
        assert model.processor.tokenizer is model.tokenizer
    assert repr(model.processor) == "<processor, not loaded yet>"


def test_the_processor_of_a_model_that_reads_text_alone_is_its_tokenizer(
    run: Run, pictures: list[Path], tmp_path: Path
) -> None:
    folder = write_llama(tmp_path, tokenizer=words(WORDS, "<unk>"))
    model = streamed_model(folder, minimum_of(folder))
    with model.lamina:
        assert model.processor("what is")["input_ids"] == [3, 4]
        assert model.processor is model.tokenizer
    result = run(*asked(folder, "what is this", "--image", str(pictures[0]), "--quiet"))
    assert (result.code, result.err) == (2, "lamina: LlamaForCausalLM takes no pictures\n")


def write_whisper(folder: Path, width: int = 16) -> Path:
    vocabulary = {token: index for index, token in enumerate([*BYTES, *TRANSCRIPT.split()])}
    end = vocabulary["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(vocabulary), encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=width, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
        max_target_positions=64,
        decoder_start_token_id=end + 1, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(no_timestamps_token_id=end + 5, is_multilingual=False, prev_sot_token_id=end + 6)
    spread(model, folder)
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], unk_token="<|endoftext|>")
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("prompt", ["", "hi"])
def test_a_sound_is_written_down(prompt: str, run: Run, whisper: Path, tmp_path: Path) -> None:
    samples = (np.random.default_rng(0).normal(size=32_000) * 3000).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(16_000)
        written.writeframes(samples.tobytes())
    processor = transformers.AutoProcessor.from_pretrained(whisper)
    inputs = processor(audio=samples.astype("float32") / 32768, sampling_rate=16_000, return_tensors="pt")
    before = {"prompt_ids": processor.get_prompt_ids(prompt, return_tensors="pt")} if prompt else {}
    words = [prompt] if prompt else []
    result = run(*asked(whisper, *words, "--audio", str(tmp_path / "a.wav"))[:-2])
    assert tokens(result) == answer(whisper, inputs, **before)
