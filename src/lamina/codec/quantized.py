"""Quantised checkpoints as codecs: one matrix is one panel, its stored tensors one after another."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from lamina.codec.codec import Codec, LentName, lend
from lamina.codec.quantized_layouts import ROWS_AT_ONCE, Packed, blocks
from lamina.plan.layout import PACKING, align


@dataclass(frozen=True)
class PanelField:
    """One stored tensor of a panel: its first byte there, and what it is."""

    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the panel."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, panel: torch.Tensor) -> torch.Tensor:
        """The tensor, out of the panel's bytes."""
        raw = panel[self.at : self.at + self.nbytes]
        if raw.storage_offset() % self.dtype.itemsize:
            raw = raw.clone()
        return raw.view(self.dtype).view(self.shape)


class PackedCodec(Codec):
    """Unpacks matrices, or some rows of them. It belongs to the checkpoint whose layout it is.

    Args:
        packed: what the stored tensors of one matrix mean.
        fields: these tensors.
    """

    has_rows = True

    def __init__(self, packed: Packed, fields: tuple[PanelField, ...]) -> None:
        self.packed, self.fields = packed, fields
        self.rows = math.prod(packed.shape[:-1])
        self._text = f"{packed!r} of {fields!r}"

    @property
    def name(self) -> LentName:  # type: ignore[override]
        """A name by which `codec_for` finds it while that name is kept."""
        return lend(self, self._text)

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel, which holds one matrix; of several tensors, rounded up to `PACKING`."""
        end = self.fields[-1].at + self.fields[-1].nbytes
        return align(end, PACKING) if len(self.fields) > 1 else end

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        """See `Codec`."""
        for panel, part in zip(panels, torch.split(out, self.rows), strict=True):
            part.copy_(self.packed(*(field.of(panel) for field in self.fields)).view(-1, columns))

    def unpack_rows(self, panels: torch.Tensor, first: int, rows: int, columns: int, out: torch.Tensor) -> None:
        """See `Codec`."""
        done = 0
        while done < rows:
            panel, row = divmod(first + done, self.rows)
            count = min(rows - done, self.rows - row)
            stored = [field.of(panels[panel]) for field in self.fields]
            skip = row % ROWS_AT_ONCE
            for begin, part in blocks(skip + count, columns):
                unpacked = self.packed.rows(row - skip + begin, part, *stored)
                low = max(begin, skip)
                out[done + low - skip : done + begin + part - skip] = unpacked[low - begin :]
            done += count


def codec_of(packed: Packed, stored: list[tuple[tuple[int, ...], torch.dtype]]) -> PackedCodec | None:
    """The codec for one matrix of a quantised weight; None where its tensors do not divide into matrices.

    Args:
        packed: what the tensors mean, of two dimensions, or of three: several matrices.
        stored: shape and dtype of each tensor.
    """
    matrices = packed.shape[0] if len(packed.shape) == 3 else 1
    if len(packed.shape) not in (2, 3) or (matrices > 1 and any(s[:1] != (matrices,) for s, _ in stored)):
        return None
    fields: list[PanelField] = []
    end = 0
    for shape, dtype in stored:
        own = (1, *shape[1:]) if matrices > 1 else shape
        fields.append(PanelField(align(end, PACKING), own, dtype))
        end = fields[-1].at + fields[-1].nbytes
    one = dataclasses.replace(packed, shape=(1, *packed.shape[1:])) if matrices > 1 else packed
    return PackedCodec(one, tuple(fields))
