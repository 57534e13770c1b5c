"""`bf16z`: bf16 without loss in two thirds of the bytes, at a rate that is fixed beforehand.

Sign and mantissa of a weight are noise, its exponent is not: of a normally distributed tensor three exponents hold
three quarters of the elements. So an exponent is stored as

    2 bits   0, 1, 2: the three commonest exponents of the panel; 3: another one, which has
    3 bits   0 to 6: the next seven; 7: an escape, which has
    8 bits   the exponent itself

each kind on its own plane. Every bit pattern comes back, NaNs and their payloads too. A panel of n elements, its rows
one after another, has R = n / 256 and C = n / 4096, both rounded up:

    4 bytes      rows of a panel
    10 bytes     the three exponents, then the seven; 2 bytes of zero
    4 C bytes    of each 4096 elements: how many second codes, how many escapes, 2 bytes each
    256 R bytes  sign (the upper bit) and mantissa of each element
    64 R bytes   first codes: byte i of a run of 256 holds elements i, i + 64, i + 128, i + 192, from the lower bits up
    48 S bytes   second codes of all elements in turn, S = their number / 128, rounded up. Of 128: byte i of the first
                 32 holds the lower two bits of i, i + 32, i + 64, i + 96; byte i of the other 16 the third of
                 i + 16 k at bit k
    ...          escapes; then zeros up to the bytes of a panel

Panels of a tensor have equal bytes, those of the one that needs most: encoding takes two passes, `need` and `encode`.
"""

from __future__ import annotations

import ctypes
import math

import torch

from lamina.codec import native
from lamina.codec.codec import Codec
from lamina.errors import ChangedError, CheckpointError

CHUNK, RUN, SECONDS = 4096, 256, 128
HEAD = 16
FIRST, SECOND = 3, 7  # how many exponents have a code of two bits, of three more
PANEL_ROWS = 256
WORTH = 0.95  # of the plain bytes: a tensor that does not become smaller than that is better stored plain


class Lossless(Codec):
    """The codec `bf16z`; see the head of this file.

    It never multiplies: unpacked, a weight is as it was, and torch's own product gives the bits it always gave.
    """

    name = "bf16z"

    def need(self, block: torch.Tensor, panel_rows: int) -> int:
        """Bytes that the neediest panel of these rows takes.

        Args:
            block: bf16 of shape (rows, columns), beginning with a panel.
            panel_rows: rows of a panel.
        """
        if block.numel() == 0:
            return HEAD
        if (kernels := native.kernels_for(block)) is not None:
            return _encode_natively(kernels, block, panel_rows, 0, None)
        return max(_need(_split(panel)[1]) for panel in torch.split(block, panel_rows))

    def saves(self, panel_bytes: int, panel_rows: int, rows: int, columns: int) -> bool:
        """Whether a tensor of that many rows is better stored in such panels than plain."""
        return math.ceil(rows / panel_rows) * panel_bytes <= WORTH * 2 * rows * columns

    def encode(self, block: torch.Tensor, panel_rows: int, panel_bytes: int) -> torch.Tensor:
        """Rows as panels.

        Args:
            block: bf16 of shape (rows, columns), beginning with a panel.
            panel_rows: rows of a panel.
            panel_bytes: the largest `need` among all blocks of the tensor.

        Returns:
            uint8 of shape (panels, panel_bytes).

        Raises:
            ChangedError: a panel needs more.
        """
        panels = torch.empty(math.ceil(len(block) / panel_rows), panel_bytes, dtype=torch.uint8)
        if block.numel() == 0:
            return panels.zero_()
        if (kernels := native.kernels_for(block)) is not None:
            need = _encode_natively(kernels, block, panel_rows, panel_bytes, panels)
        else:
            encoded = [_encode(panel, panel_rows) for panel in torch.split(block, panel_rows)]
            need = max(len(panel) for panel in encoded)
            for panel, some in zip(panels, encoded, strict=True):
                panel.copy_(_exactly(some, panel_bytes))
        if need > panel_bytes:
            raise ChangedError(
                f"a panel takes {need} bytes in bf16z, when it was measured it took at most {panel_bytes}: the tensor "
                "has changed in between, split the model again"
            )
        return panels

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        """See `Codec`.

        Raises:
            CheckpointError: the panels are damaged, as far as that shows: most bits are plain noise.
        """
        if rows * columns == 0:
            return
        panel_rows = self._panel_rows(panels, rows, columns)
        if out.dtype != torch.bfloat16:
            self._unpack_and_convert(panels, rows, columns, panel_rows, out)
            return
        kernels = native.kernels_for(out)
        if kernels is None:
            parts = zip(panels, torch.split(out, panel_rows), strict=True)
            wrong = sum(_unpack(panel, some) for panel, some in parts)
        else:
            sizes = (*panels.shape, panel_rows * columns, rows * columns)
            wrong = kernels.lamina_bf16z_decode(panels.data_ptr(), *sizes, out.data_ptr(), torch.get_num_threads())
        if wrong:
            raise CheckpointError(
                f"{len(panels)} panels of {rows} rows in bf16z contradict themselves in {wrong} places: the file is "
                "damaged, split the model again"
            )

    def _panel_rows(self, panels: torch.Tensor, rows: int, columns: int) -> int:
        """Rows of a panel, so that nothing else can lead outside of the panels."""
        count, panel_bytes = panels.shape
        panel_rows = rows
        if count > 1:
            panel_rows = int.from_bytes(bytes(panels[0, :4].tolist()), "little")
        fixed = _need_of_counts([panel_rows * columns])
        if panel_rows < 1 or math.ceil(rows / panel_rows) != count or fixed > panel_bytes:
            raise CheckpointError(
                f"{rows} rows of {columns} columns in bf16z are not {count} panels of {panel_bytes} bytes: the "
                "checkpoint's encoding is not that of its tensors"
            )
        return panel_rows

    def _unpack_and_convert(
        self, panels: torch.Tensor, rows: int, columns: int, panel_rows: int, out: torch.Tensor
    ) -> None:
        scratch = torch.empty(min(panel_rows, rows), columns, dtype=torch.bfloat16, device=out.device)
        for index, some in enumerate(torch.split(out, panel_rows)):
            self.unpack(panels[index : index + 1], len(some), columns, scratch[: len(some)])
            some.copy_(scratch[: len(some)])


def _encode_natively(
    kernels: ctypes.CDLL, block: torch.Tensor, panel_rows: int, panel_bytes: int, panels: torch.Tensor | None
) -> int:
    """The bytes that the neediest panel takes; writes where there are panels and they are large enough."""
    block = block.contiguous()
    need: int = kernels.lamina_bf16z_encode(
        *(block.data_ptr(), block.numel(), panel_rows * block.shape[1], panel_rows, panel_bytes),
        *(None if panels is None else panels.data_ptr(), torch.get_num_threads()),
    )
    return need


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 -> sign and mantissa as one byte, exponent: uint8, flat."""
    bits = rows.contiguous().view(torch.int16).flatten()
    return ((bits >> 8 & 0x80) | (bits & 0x7F)).to(torch.uint8), (bits >> 7 & 0xFF).to(torch.uint8)


def _ranked(exponents: torch.Tensor) -> tuple[list[int], list[int]]:
    """How often each exponent occurs, and exponents from the commonest to the rarest."""
    counts = torch.bincount(exponents, minlength=256).tolist()
    return counts, sorted(range(256), key=lambda each: (-counts[each], each))


def _need(exponents: torch.Tensor) -> int:
    counts, ranked = _ranked(exponents)
    return _need_of_counts([counts[each] for each in ranked])


def _need_of_counts(ranked: list[int]) -> int:
    """Bytes of a panel, from how often its exponents occur, the commonest first."""
    elements, seconds, escapes = sum(ranked), sum(ranked[FIRST:]), sum(ranked[FIRST + SECOND :])
    fixed = HEAD + 4 * math.ceil(elements / CHUNK) + (RUN + RUN // 4) * math.ceil(elements / RUN)
    return fixed + 48 * math.ceil(seconds / SECONDS) + escapes


def _encode(rows: torch.Tensor, panel_rows: int) -> torch.Tensor:
    """One panel in torch alone, as many bytes as it needs."""
    raw, exponents = _split(rows)
    _, ranked = _ranked(exponents)
    codes = torch.full((2, 256), FIRST, dtype=torch.uint8)  # of the first plane, of the second
    codes[1] = SECOND
    codes[0, ranked[:FIRST]] = torch.arange(FIRST, dtype=torch.uint8)
    codes[1, ranked[FIRST : FIRST + SECOND]] = torch.arange(SECOND, dtype=torch.uint8)
    firsts = codes[0][exponents.int()]
    other = firsts == FIRST
    others = exponents[other]
    seconds = codes[1][others.int()]
    escapes = others[seconds == SECOND]
    escaped = torch.zeros_like(other).masked_scatter_(other, seconds == SECOND)
    counts = torch.stack([_per_chunk(other), _per_chunk(escaped)], dim=1)
    parts = [
        torch.tensor([*panel_rows.to_bytes(4, "little"), *ranked[: FIRST + SECOND], 0, 0], dtype=torch.uint8),
        counts.to(torch.int16).view(torch.uint8).flatten(),
        _fill(raw, RUN),
        _interleave(_fill(firsts, RUN).view(-1, 4, 64), 2),
        _pack_seconds(_fill(seconds, SECONDS).view(-1, SECONDS)),
        escapes,
    ]
    return torch.cat(parts)


def _fill(flat: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros at the end, to a multiple of `size`."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size))


def _interleave(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [runs, n, bytes] as bytes, the first code in the lower bits; flat."""
    packed = codes[:, 0].clone()
    for index in range(1, codes.shape[1]):
        packed |= codes[:, index] << bits * index
    return packed.flatten()


def _pack_seconds(codes: torch.Tensor) -> torch.Tensor:
    lower = _interleave((codes & 3).view(-1, 4, 32), 2).view(-1, 32)
    upper = _interleave((codes >> 2).view(-1, 8, 16), 1).view(-1, 16)
    return torch.cat([lower, upper], dim=1).flatten()


def _unpack(panel: torch.Tensor, out: torch.Tensor) -> int:
    """One panel in torch alone; how many of its chunks are damaged."""
    elements = out.numel()
    chunks, runs = math.ceil(elements / CHUNK), math.ceil(elements / RUN)
    head, counts, raw, firsts, rest = torch.split(
        panel, [HEAD, 4 * chunks, RUN * runs, RUN // 4 * runs, len(panel) - _need_of_counts([elements])]
    )
    counts = counts.clone().view(torch.int16).view(chunks, 2).int() & 0xFFFF
    codes = _separate(firsts.view(-1, 64), 4, 2).flatten()
    other = codes == FIRST
    groups = min(math.ceil(int(counts[:, 0].sum()) / SECONDS), len(rest) // 48)
    packed, escapes = rest[: 48 * groups].view(groups, 48), rest[48 * groups :]
    seconds = _separate(packed[:, :32], 4, 2) | _separate(packed[:, 32:], 8, 1) << 2
    seconds = _exactly(seconds.flatten(), int(other.sum()))
    escaped = seconds == SECOND
    late = head[4 + FIRST : 5 + FIRST + SECOND][seconds.int()]  # one byte more: an escape's, replaced here
    late.masked_scatter_(escaped, _exactly(escapes, int(escaped.sum())))
    exponents = head[4 : 5 + FIRST][codes.int()].masked_scatter_(other, late)[:elements].int()
    raw = raw[:elements].int()
    bits = (raw & 0x80) << 8 | raw & 0x7F | exponents << 7
    out.view(torch.int16).copy_(bits.to(torch.int16).view(out.shape))
    found = [_per_chunk(each) for each in (other, torch.zeros_like(other).masked_scatter_(other, escaped))]
    return int((torch.stack(found, dim=1) != counts).any(1).sum())


def _exactly(flat: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size`, zeros where there are fewer."""
    return torch.nn.functional.pad(flat[:size], (0, max(0, size - len(flat))))


def _per_chunk(flags: torch.Tensor) -> torch.Tensor:
    return _fill(flags, CHUNK).view(-1, CHUNK).sum(1)


def _separate(packed: torch.Tensor, number: int, bits: int) -> torch.Tensor:
    """Bytes [runs, n] -> codes [runs, number * n], the reverse of `_interleave`."""
    return torch.cat([packed >> bits * index & (2**bits - 1) for index in range(number)], dim=1)
