"""How fast encoded weights become products on this machine: measured once, on the weights themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from lamina.checkpoint.gguf import CODEC_PREFIX
from lamina.codec import AFFINE, LOSSLESS, native
from lamina.model.encoded import Encoded
from lamina.model.engine import Engine
from lamina.plan.layout import Part, lay_out
from lamina.plan.schedule import Convert, Weight
from lamina.stream.memory import Area

SAMPLE = 8 << 20  # bytes of decoded rows that are multiplied for the measurement
ATTEMPTS = 3
WITH_KERNELS = (*AFFINE, LOSSLESS.name, CODEC_PREFIX)


def is_encoded(weight: Weight) -> bool:
    """Whether panels of some codec hold it."""
    return weight.convert is Convert.DECODE and bool(weight.segments)


def decoding_rate(engine: Engine) -> float | None:
    """Bytes of decoded weights that a product of one row goes through in a second; None where nothing is encoded.

    Reads a few rows of one weight for each codec, and weighs the codecs by what they hold.
    """
    held: dict[str, int] = {}
    largest: dict[str, Weight] = {}
    for weight in filter(is_encoded, engine.schedule.values()):
        codec = weight.segments[0].codec
        held[codec] = held.get(codec, 0) + weight.decoded_nbytes
        largest[codec] = max(largest.get(codec, weight), weight, key=lambda each: each.decoded_nbytes)
    if not held:
        return None
    seconds = sum(held[codec] * _seconds_per_byte(engine, weight) for codec, weight in largest.items())
    return sum(held.values()) / seconds if seconds else None


def _seconds_per_byte(engine: Engine, weight: Weight) -> float:
    row = weight.decoded_nbytes // weight.rows
    rows = min(max(SAMPLE // max(row, 1), 1), weight.rows) if weight.by_rows else weight.rows
    if weight.by_rows and len(weight.shape) == 2:
        rows = min(max(rows // weight.segments[0].panel_rows, 1) * weight.segments[0].panel_rows, weight.rows)
    layout = lay_out([(weight, Part(weight.name, 0, rows))])
    area = Area(layout.nbytes)
    engine.readers.read(layout.reads, area)
    finished = engine.finish(layout.placed[0], area.tensor.to(engine.device))
    assert isinstance(finished, Encoded)
    matrix = finished.view(-1, weight.shape[-1])
    x = torch.zeros(1, weight.shape[-1], dtype=matrix.dtype, device=engine.device)
    with torch.inference_mode():
        return min(_timed(x, matrix) for _ in range(ATTEMPTS)) / (rows * row)


def _timed(x: torch.Tensor, matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.linear(x, matrix)[0, 0].item()
    return time.perf_counter() - began


def prepare(weights: Iterable[Weight]) -> None:
    """Have the codecs' kernels ready, which may mean compiling them: before memory is full."""
    codecs = {segment.codec for weight in weights for segment in weight.segments}
    if any(codec.startswith(WITH_KERNELS) for codec in codecs):
        native.library()
