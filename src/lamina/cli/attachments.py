"""Pictures and sounds that go with a text: opened, and put with it into what the model is given."""

from __future__ import annotations

import importlib
import os
import warnings
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lamina.cli import library
from lamina.cli.report import one_line
from lamina.errors import RequestError

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
    pil = _package("PIL.Image", "Pillow", "vision")
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
    soundfile = _package("soundfile", "soundfile", "audio")
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


def _package(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: soundfile, without the library that it calls
        raise RequestError(f"{package} is needed for this and not installed: pip install 'lamina[{extra}]'") from error


def kinds_taken(model: Any) -> list[Kind]:
    """What a model has inputs for beside text."""
    # Its `input_modalities` do not tell: a class for text alone inherits those of its family.
    return [kind for kind in (IMAGE, AUDIO) if kind.inputs & library.inputs_taken(model)]


def check_taken(model: Any, attached: Sequence[Attachment]) -> None:
    """Refuse what the model has no inputs for.

    Raises:
        RequestError: it names the model's class.
    """
    taken = kinds_taken(model)
    if refused := next((each.kind for each in attached if each.kind not in taken), None):
        raise RequestError(f"{type(model).__name__} takes no {refused.word}s")


def content_of(attached: Sequence[Attachment], text: str) -> str | list[Attachment | str]:
    """The content of a message."""
    return [*attached, *([text] if text else [])] if attached else text


def attached_to(messages: Sequence[Message]) -> list[Attachment]:
    """All of a conversation, in their order."""
    return [part for message in messages for part in message["content"] if isinstance(part, Attachment)]


def in_parts(messages: Sequence[Message], processor: Any) -> list[Message]:
    """A conversation as the chat templates of models with several kinds of inputs read it."""

    def part(each: Attachment | str) -> dict[str, Any]:
        if isinstance(each, str):
            return {"type": "text", "text": each}
        return {"type": each.kind.name, each.kind.name: _value(each, processor)}

    def parts(content: str | Sequence[Attachment | str]) -> list[dict[str, Any]]:
        return [part(each) for each in ([content] if isinstance(content, str) else content)]

    return [{**message, "content": parts(message["content"])} for message in messages]


def encode_bare(model: Any, name: str, prompt: str, attached: Sequence[Attachment]) -> dict[str, Any]:
    """The inputs of `generate` for a prompt with pictures or sounds, without a chat template.

    A token for each of them stands before the prompt, as far as the prompt has none itself.

    Raises:
        RequestError: the model does not take them.
    """
    processor = processor_of(model, name, attached)
    arguments: dict[str, Any] = {"return_tensors": "pt"}
    text = prompt
    for kind in dict.fromkeys(each.kind for each in attached):
        values = arguments[kind.argument] = [_value(each, processor) for each in attached if each.kind is kind]
        if isinstance(token := getattr(processor, f"{kind.name}_token", None), str):
            text = token * max(len(values) - text.count(token), 0) + text
    if AUDIO.argument in arguments:
        arguments["sampling_rate"] = _rate(processor)
    with refusals(name):
        if hasattr(processor, "get_prompt_ids"):  # of one that only listens the prompt is what was said before
            before = {"prompt_ids": processor.get_prompt_ids(prompt, return_tensors="pt")} if prompt else {}
            return on_device(model, {**processor(**arguments), **before})
        return on_device(model, processor(**arguments, **({"text": text} if text else {})))


def processor_of(model: Any, name: str, attached: Sequence[Attachment]) -> Any:
    """The processor of a model that takes what is attached.

    Raises:
        RequestError: it takes none, or no processor is with it.
    """
    check_taken(model, attached)
    processor = model.processor
    if hasattr(processor, "convert_tokens_to_ids") and not hasattr(processor, "tokenizer"):
        kinds = " and ".join(dict.fromkeys(f"{each.kind.word}s" for each in attached))
        raise RequestError(f"{name} has a tokenizer and no processor of {kinds} (preprocessor_config.json)")
    return processor


def _value(attached: Attachment, processor: Any) -> Any:
    """What a processor is given; of a sound, at as many samples a second as it takes."""
    wanted = _rate(processor)
    if attached.kind is not AUDIO or attached.rate == wanted:
        return attached.value
    return _package("soxr", "soxr", "audio").resample(attached.value, attached.rate, wanted)


def _rate(processor: Any) -> int:
    for each in (getattr(processor, "feature_extractor", None), getattr(processor, "audio_processor", None), processor):
        if isinstance(found := getattr(each, "sampling_rate", None), int):
            return found
    return 16_000


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """What the processor or the template of a model raises over its input, as a refusal in one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError) as error:
        raise RequestError(f"the processor of {name} refuses this: {one_line(error)}") from error
    except Exception as error:
        # Templates say no with their own raise_exception; jinja2's tree is no dependency of ours.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RequestError(f"the chat template of {name} refuses this conversation: {error}") from error


def on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs beside the model, numbers that are no ids in the model's own type."""
    # A BatchFeature has this as its `to`; some processors give a BatchEncoding, whose `to` takes no type.
    dtype = getattr(model, "dtype", None)

    def moved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [moved(each) for each in value]
        if not hasattr(value, "is_floating_point"):
            return value
        return value.to(model.device, dtype) if value.is_floating_point() else value.to(model.device)

    return {key: moved(value) for key, value in inputs.items()}


ATTACH: dict[str, Callable[[str], Attachment]] = {"/image": open_image, "/audio": open_audio}
"""The commands of a chat that attach a file to the next message."""


def open_typed(command: str, path: str, model: Any) -> Attachment:
    """What a command of a chat attaches, its path with or without the quotes that a terminal puts around a drop.

    Raises:
        RequestError: it cannot be read, or the model has no inputs for it.
    """
    if not path:
        raise RequestError(f"{command} needs a path: {command} PATH")
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" and not os.path.exists(path):
        path = path[1:-1]
    attached = ATTACH[command](path)
    check_taken(model, [attached])
    return attached
