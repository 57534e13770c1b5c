"""Pictures and sounds on the command line: what reaches the model, and the one line for what cannot."""

from __future__ import annotations

import os
import struct
import sys
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.cli_double import Library, Model, Processor, Seeing, Tokenizer
from lamina.cli import library as engine
from lamina.errors import RequestError
from lamina.messages import attachments, inputs
from unit.cli.test_chat import talk
from unit.cli.test_commands import Run, one_line, run

__all__ = ["run"]  # a fixture
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """A model that sees."""
    double = Library(Seeing("yes", processor=Processor()))
    monkeypatch.setattr(engine, "library", lambda options: double)
    return double


@pytest.fixture
def cat(tmp_path: Path) -> str:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a cat.png")
    return str(tmp_path / "a cat.png")


@pytest.fixture
def dog(tmp_path: Path) -> str:
    Image.new("RGBA", (3, 5)).save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


def seen(library: Library) -> Any:
    return library.model.generate_kwargs["pixel_values"]


def test_pictures_go_before_a_bare_prompt(run: Run, library: Library, cat: str, dog: str) -> None:
    assert run("run", "m", "what?", "--image", cat, "--image", dog).out.endswith("yes\n")
    assert library.model.prompts == ["<image><image>what?"]
    assert seen(library) == [[6, 4], [3, 5]]


def test_a_prompt_that_places_its_pictures_is_taken_as_it_is(run: Run, library: Library, cat: str, dog: str) -> None:
    assert run("run", "m", "this <image> or <image>?", "--image", cat, "--image", dog).code == 0
    assert library.model.prompts == ["this <image> or <image>?"]


def test_where_there_is_a_chat_template_a_picture_is_asked_about(run: Run, library: Library, cat: str) -> None:
    library.model.processor = Processor("{{ messages }}")
    assert run("run", "m", "what?", "--image", cat, "--json").code == 0
    assert library.model.prompts == ["user:<image>|user:what?"]
    assert seen(library) == [[6, 4]]


def test_a_picture_needs_no_prompt(run: Run, library: Library, cat: str) -> None:
    assert run("run", "m", "--image", cat).code == 0
    assert library.model.prompts == ["<image>"]


def test_chat_is_refused_without_a_template(run: Run, library: Library, cat: str) -> None:
    result = run("run", "m", "what?", "--image", cat, "--chat")
    assert result.code == 2 and "no chat template" in result.err


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    picture = Image.new("L", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "held.jpg", exif=exif)
    opened = attachments.open_image(str(tmp_path / "held.jpg")).value
    assert opened.size == (4, 6) and opened.mode == "RGB"


def bomb(path: Path) -> None:
    """A PNG file of a few bytes that says it has 10^10 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def write_bad(name: str, folder: Path, cat: str) -> str:
    path = folder / name
    data = Path(cat).read_bytes()
    if name == "folder":
        path.mkdir()
    elif name == "bomb":
        bomb(path)
    elif name == "pipe":
        os.mkfifo(path)
    elif name != "none":
        Image.effect_noise((64, 64), 50).save(folder / "noise.png")
        data = (folder / "noise.png").read_bytes()
        path.write_bytes({"empty": b"", "text": b"not a picture\n", "cut": data[: len(data) // 2]}[name])
    return str(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "there is no picture"),
        ("folder", "is a folder: name a picture"),
        ("pipe", "is no file: name a picture"),
        ("bomb", "pixels: make it smaller first"),
        ("empty", "is no picture of a known format"),
        ("text", "is no picture of a known format"),
        ("cut", "cannot be read as a picture"),
    ],
)
def test_a_bad_picture_is_one_line_before_the_model_is_opened(
    name: str, said: str, run: Run, library: Library, tmp_path: Path, cat: str
) -> None:
    path = write_bad(name, tmp_path, cat)
    result = run("run", "m", "what?", "--image", cat, "--image", path)
    assert result.code == 2 and not library.opened
    line = one_line(result)
    assert path in line and said in line


def test_too_many_pictures_are_refused(run: Run, library: Library, cat: str) -> None:
    result = run("run", "m", "what?", *["--image", cat] * 65)
    assert result.code == 2 and not library.opened
    assert "65 pictures and sounds are too many for one message: give at most 64" in one_line(result)


def test_a_picture_and_token_ids_are_refused(run: Run, library: Library, cat: str) -> None:
    result = run("run", "m", "--prompt-ids", "1,2", "--image", cat)
    assert result.code == 2 and "--image needs the prompt as text, not as --prompt-ids" in one_line(result)


def test_a_model_without_eyes_or_ears_is_named_by_its_class(
    run: Run, library: Library, cat: str, tmp_path: Path
) -> None:
    write_wave(tmp_path / "a.wav", [0, 1])
    result = run("run", "m", "what?", "--audio", str(tmp_path / "a.wav"))
    assert result.code == 2 and "lamina: Seeing takes no sounds" in result.err.splitlines()
    library.model = Model()
    result = run("run", "m", "what?", "--image", cat)
    assert result.code == 2 and "lamina: Model takes no pictures" in result.err.splitlines()


def test_a_model_without_the_files_of_a_processor_says_so(run: Run, library: Library, cat: str) -> None:
    class Words(Tokenizer):
        def convert_tokens_to_ids(self, token: str) -> int:
            return 0

    library.model.processor = Words()
    result = run("run", "m", "what?", "--image", cat)
    assert result.code == 2 and "m has a tokenizer and no processor of pictures" in result.err


def test_what_a_processor_refuses_is_one_line(
    run: Run, library: Library, cat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Processor, **_: Any) -> None:
        raise ValueError("two pictures\nat most")

    monkeypatch.setattr(Processor, "__call__", refuse)
    result = run("run", "m", "what?", "--image", cat)
    assert result.code == 2 and "the processor of m refuses this: two pictures at most" in result.err


def test_without_pillow_the_line_says_what_to_install(
    run: Run, library: Library, cat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    result = run("run", "m", "what?", "--image", cat)
    assert result.code == 2 and "pip install 'lamina[vision]'" in one_line(result)


def test_a_picture_goes_with_the_next_message_and_stays_in_the_conversation(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cat: str, dog: str
) -> None:
    library.model.tokenizer = Tokenizer("{{ messages }}")
    library.model.processor = Processor("{{ messages }}")
    assert talk(monkeypatch, f"/image {cat}\n/image '{dog}'\nwhat?\nand now?\n/reset\nwhat?\n") == 0
    assert library.model.prompts == [
        "user:<image>|user:<image>|user:what?",
        "user:<image>|user:<image>|user:what?|assistant:yes|user:and now?",
        "user:what?",
    ]
    assert "a cat.png goes with the next message" in capsys.readouterr().err


def test_reset_forgets_what_is_attached(library: Library, monkeypatch: pytest.MonkeyPatch, cat: str) -> None:
    library.model.processor = Processor("{{ messages }}")
    talk(monkeypatch, f"/image {cat}\n/reset\nwhat?\n")
    assert library.model.prompts == ["user:what?"]


def test_a_picture_for_a_model_without_eyes_is_refused_at_once(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cat: str
) -> None:
    library.model = Model("yes")
    assert talk(monkeypatch, f"/image {cat}\nwhat?\n") == 0
    assert library.model.prompts == ["user:what?"]
    assert "lamina: Model takes no pictures" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/image", "/image needs a path: /image PATH"),
        ("/image nowhere.png", "there is no picture nowhere.png"),
        ("/audio nowhere.wav", "there is no sound nowhere.wav"),
    ],
)
def test_a_bad_picture_does_not_end_the_chat(
    command: str,
    said: str,
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert talk(monkeypatch, f"{command}\nwhat?\n") == 0
    assert library.model.prompts == ["user:what?"]
    assert f"lamina: {said}" in capsys.readouterr().err.splitlines()


def test_a_model_whose_template_reads_parts_is_given_parts(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    template = "{% for part in m.content if part.type == 'text' %}"
    tokenizer = library.model.tokenizer = Tokenizer(template)

    def note(messages: list[Any], **_: Any) -> Any:
        given.append(messages)
        return tokenizer("x", return_tensors="pt")

    monkeypatch.setattr(tokenizer, "apply_chat_template", note)
    talk(monkeypatch, "what?\n")
    assert given[-1] == [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]


def write_wave(path: Path, values: list[int], *, channels: int = 1, rate: int = 16_000, width: int = 2) -> None:
    with wave.open(str(path), "wb") as written:
        written.setnchannels(channels)
        written.setsampwidth(width)
        written.setframerate(rate)
        written.writeframes(np.array(values, f"<i{width}").tobytes())


@pytest.mark.parametrize("width", [2, 4])
def test_a_wave_file_is_one_channel_between_one_and_minus_one(width: int, tmp_path: Path) -> None:
    half = 2 ** (8 * width - 2)
    write_wave(tmp_path / "a.wav", [half, half, -half, half, 0, -2 * half], channels=2, width=width)
    opened = attachments.open_audio(str(tmp_path / "a.wav"))
    assert opened.rate == 16_000 and opened.value.dtype == np.float32
    assert opened.value.tolist() == [0.5, 0.0, -0.5]


def test_a_sound_without_samples_and_one_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wave(tmp_path / "a.wav", [])
    with pytest.raises(RequestError, match="is a sound of no length"):
        attachments.open_audio(str(tmp_path / "a.wav"))
    monkeypatch.setattr(attachments, "MOST_SAMPLES", 3)
    write_wave(tmp_path / "b.wav", [1, 2, 3, 4])
    with pytest.raises(RequestError, match=r"/b\.wav has 4 samples, at most 3 are taken"):
        attachments.open_audio(str(tmp_path / "b.wav"))


@pytest.mark.parametrize("package", ["soundfile", None])
def test_what_is_no_wave_file_is_refused_in_one_line(
    package: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp3").write_bytes(b"no sound")
    if package:
        pytest.importorskip(package)
        said = "cannot be read as a sound"
    else:
        monkeypatch.setitem(sys.modules, "soundfile", None)
        said = r"soundfile is needed for this and not installed: pip install 'lamina\[audio\]'"
    with pytest.raises(RequestError, match=said):
        attachments.open_audio(str(tmp_path / "a.mp3"))


def test_a_sound_of_another_rate_is_resampled(tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    write_wave(tmp_path / "a.wav", [0] * 44_100, rate=44_100)
    (message,) = inputs.in_parts(
        [{"role": "user", "content": [attachments.open_audio(str(tmp_path / "a.wav"))]}], Processor()
    )
    assert message["content"][0]["audio"].shape == (16_000,)
