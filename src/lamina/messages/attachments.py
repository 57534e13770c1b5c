"""Pictures and sounds that go with a text: opened, checked, and resampled."""

from __future__ import annotations

import importlib
import os
import warnings
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import RequestError, one_line

MOST = 64  # in one message
MOST_SAMPLES = 100_000_000  # of one sound: 104 minutes at 16 kHz, 400 MB
Message = dict[str, Any]
"""`role`, and `content`: a text, or a list of `Attachment`s with a text at its end."""


@dataclass(frozen=True)
class Kind:
    """What can be attached.

    Attributes:
        name: as chat templates call it, and the option; `{name}_token` of a processor stands for one in a text.
        word: for one, in an error.
        argument: of a processor.
        inputs: as models call them; a model that takes none of them takes none of this kind.
    """

    name: str
    word: str
    argument: str
    inputs: frozenset[str]


IMAGE = Kind(
    "image", "picture", "images", frozenset("pixel_values image_pixel_values flattened_patches image_patches".split())
)
AUDIO = Kind("audio", "sound", "audio", frozenset("input_features input_values audio_input_features".split()))


@dataclass(frozen=True)
class Attachment:
    """One picture or sound.

    Attributes:
        value: a picture of PIL's, in RGB; or samples, float32, one channel.
        rate: samples a second.
    """

    kind: Kind
    path: str
    value: Any
    rate: int = 0


def opened(images: Sequence[str], sounds: Sequence[str]) -> list[Attachment]:
    """What the paths name.

    Raises:
        RequestError: one cannot be read, or there are too many.
    """
    check_number(len(images) + len(sounds))
    return [open_image(path) for path in images] + [open_audio(path) for path in sounds]


def check_number(count: int) -> None:
    """Refuse more than a message may have."""
    if count > MOST:
        raise RequestError(f"{count} pictures and sounds are too many for one message: give at most {MOST}")


def open_image(path: str) -> Attachment:
    """A picture, decoded as a whole, turned as its camera was held.

    Raises:
        RequestError: there is none, it is broken, or it has too many pixels; or Pillow is not installed.
    """
    path = _file(path, IMAGE)
    pil = package("PIL.Image", "Pillow", "vision")
    turned = importlib.import_module("PIL.ImageOps").exif_transpose
    try:
        with warnings.catch_warnings(action="error", category=pil.DecompressionBombWarning), pil.open(path) as picture:
            return Attachment(IMAGE, path, turned(picture).convert("RGB"))
    except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
        most = f"{pil.MAX_IMAGE_PIXELS:,}".replace(",", " ")
        raise RequestError(f"{path} has more than {most} pixels: make it smaller first") from error
    except pil.UnidentifiedImageError as error:
        raise RequestError(f"{path} is no picture of a known format") from error
    except MemoryError:
        raise
    except Exception as error:  # of the many decoders, which raise whatever bytes lead them to
        raise RequestError(f"{path} cannot be read as a picture: {one_line(error)}") from error


def open_audio(path: str) -> Attachment:
    """A sound as one channel: a WAV file of whole numbers by itself, others by soundfile.

    Raises:
        RequestError: there is none, it is broken, empty or too long; or soundfile is needed and not installed.
    """
    path = _file(path, AUDIO)
    try:
        samples, rate = _wave(path) or _sound(path)
    except (OSError, RuntimeError, ValueError) as error:  # soundfile's own are a RuntimeError
        raise RequestError(f"{path} cannot be read as a sound: {one_line(error)}") from error
    if not len(samples):
        raise RequestError(f"{path} is a sound of no length")
    return Attachment(AUDIO, path, samples.mean(axis=1).astype("float32"), rate)


def _wave(path: str) -> tuple[Any, int] | None:
    """Samples, [frames, channels] in -1 to 1, and how many a second; None: not a WAV file of 16 or 32 bits."""
    numpy = importlib.import_module("numpy")
    try:
        with wave.open(path, "rb") as read:
            width, channels, rate = read.getsampwidth(), read.getnchannels(), read.getframerate()
            _check_length(path, read.getnframes() * channels)
            if width not in (2, 4) or rate <= 0:
                return None
            raw = read.readframes(read.getnframes())
    except (wave.Error, EOFError):
        return None
    whole = len(raw) // (width * channels) * channels
    samples = numpy.frombuffer(raw, dtype=f"<i{width}", count=whole)
    return samples.reshape(-1, channels) / numpy.float32(2 ** (8 * width - 1)), rate


def _sound(path: str) -> tuple[Any, int]:
    soundfile = package("soundfile", "soundfile", "audio")
    with soundfile.SoundFile(path) as read:
        _check_length(path, read.frames * read.channels)
        return read.read(dtype="float32", always_2d=True), int(read.samplerate)


def _check_length(path: str, samples: int) -> None:
    if samples > MOST_SAMPLES:
        raise RequestError(f"{path} has {samples} samples, at most {MOST_SAMPLES} are taken: cut it")


def _file(path: str, kind: Kind) -> str:
    """A path that is a file's.

    Raises:
        RequestError: there is none, or something else.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise RequestError(f"there is no {kind.word} {path}" if path else f"the path of a {kind.word} is empty")
    if not os.path.isfile(path):
        raise RequestError(f"{path} is {'a folder' if os.path.isdir(path) else 'no file'}: name a {kind.word}")
    return path


def package(module: str, package: str, extra: str) -> Any:
    """A module of an extra of this package.

    Raises:
        RequestError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: soundfile, without the library that it calls
        raise RequestError(f"{package} is needed for this and not installed: pip install 'lamina[{extra}]'") from error


def content_of(attached: Sequence[Attachment], text: str) -> str | list[Attachment | str]:
    """The content of a message."""
    return [*attached, *([text] if text else [])] if attached else text


def attached_to(messages: Sequence[Message]) -> list[Attachment]:
    """All of a conversation, in their order."""
    return [part for message in messages for part in message["content"] if isinstance(part, Attachment)]
