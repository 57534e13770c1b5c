"""`q4`, `q5`, `q6`, `q8`: weights as small integers, with a scale for each group of columns.

One row is one panel, so that any row can be read alone. Numbers are little-endian, columns are padded to whole
groups. A row of q4, q5 and q6 with G groups of 32 columns:

    2 bytes      d, bf16: unit of the scales
    2 bytes      m, bf16: unit of the centres
    G bytes      s of each group, unsigned
    G bytes      c of each group, signed
    16 G bytes   low four bits of the codes: byte i of a group holds column i, and column 16 + i in its upper half
    4 G bytes    (q5) the fifth bit: bit i of a group's 32 is column i
    8 G bytes    (q6) bits five and six: bits 2i and 2i + 1 of a group's 64 are column i

    value = (d s) (code - 2^(bits - 1)) + (m c)        4.5, 5.5, 6.5 bits a weight and 4 bytes a row

A row of q8 with B blocks of 64 columns: B scales in bf16, then the codes, signed bytes. `value = scale * code`,
8.25 bits a weight.

All products have at most 23 significant bits, so they are exact in fp32 and a value is rounded but once, by the sum;
then once more to the type wanted. Fused or not, vector or scalar, in C or torch: the bits are the same.
"""

from __future__ import annotations

import math

import torch

from lamina.codec import fitting, native
from lamina.codec.codec import Codec
from lamina.codec.fitting import BLOCK, GROUP
from lamina.errors import CheckpointError

LINEAR_TOKENS = 16  # beyond, unpacking a block of rows and torch's own product are quicker: see docs
FALLBACK_ELEMENTS = 1 << 20  # unpacked at a time without kernels: bounds what that takes besides


class Affine(Codec):
    """A codec of `bits` bits a weight; see the head of this file."""

    panel_rows = 1
    linear_tokens = LINEAR_TOKENS
    has_quick = True

    def __init__(self, bits: int) -> None:
        self.name = f"q{bits}"
        self.bits = bits

    def panel_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        if self.bits == 8:
            return math.ceil(columns / BLOCK) * (2 + BLOCK)
        return 4 + math.ceil(columns / GROUP) * (2 + GROUP * self.bits // 8)

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        """Rows of weights as panels: slow, and the same bytes whatever rows are encoded together.

        Args:
            block: shape (rows, columns), any floating dtype.

        Returns:
            uint8 of shape (rows, panel_bytes).

        Raises:
            CheckpointError: a value is not finite.
        """
        return fitting.encode(block, self.bits, self.panel_bytes(block.shape[1]))

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        """See `Codec`."""
        self._check(panels, rows, columns)
        kernels = native.kernels_for(out)
        if kernels is None:
            self._unpack_in_torch(panels, rows, columns, out)
            return
        weights = (panels.data_ptr(), rows, columns, self.bits, native.type_code(out.dtype))
        kernels.lamina_affine_decode(*weights, out.data_ptr(), torch.get_num_threads())

    def linear(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """See `Codec`. Sums are in fp32, of weights that are not rounded to x's type."""
        return self._multiply("lamina_affine_linear", x, panels, rows, out)

    def linear_quick(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """See `Codec`. x is rounded to 8 bits, a scale for each group of 32 columns; sums of groups are in fp32."""
        return self._multiply("lamina_affine_quick", x, panels, rows, out)

    def _multiply(self, kernel: str, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """Whether a kernel made the product: there are kernels, and they take x."""
        tokens, columns = x.shape
        kernels = native.kernels_for(x)
        if kernels is None or not 0 < tokens <= LINEAR_TOKENS:
            return False
        self._check(panels, rows, columns)
        weights = (panels.data_ptr(), rows, columns, self.bits, native.type_code(x.dtype))
        failed: int = getattr(kernels, kernel)(
            x.data_ptr(), tokens, *weights, out.data_ptr(), out.stride(0), torch.get_num_threads()
        )
        return not failed

    def _check(self, panels: torch.Tensor, rows: int, columns: int) -> None:
        """What keeps the kernels inside the panels."""
        wanted = (rows, self.panel_bytes(columns))
        if tuple(panels.shape) != wanted:
            raise CheckpointError(
                f"{rows} rows of {columns} columns in {self.name} are {rows} panels of {wanted[1]} bytes, here are "
                f"{panels.shape[0]} of {panels.shape[1]}: the checkpoint's encoding is not that of its tensors"
            )

    def _unpack_in_torch(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        step = max(1, FALLBACK_ELEMENTS // max(columns, 1))
        of_rows = self._rows_of_blocks if self.bits == 8 else self._rows_of_groups
        for row in range(0, rows, step):
            some = panels[row : row + step]
            out[row : row + step].copy_(of_rows(some, columns).flatten(1)[:, :columns])

    def _rows_of_blocks(self, panels: torch.Tensor, columns: int) -> torch.Tensor:
        blocks = math.ceil(columns / BLOCK)
        scales = _as_bf16(panels[:, : 2 * blocks])
        codes = panels[:, 2 * blocks :].reshape(len(panels), blocks, BLOCK).view(torch.int8)
        return scales.unsqueeze(-1) * codes.float()

    def _rows_of_groups(self, panels: torch.Tensor, columns: int) -> torch.Tensor:
        groups = math.ceil(columns / GROUP)
        units, scales, centres, low, high = torch.split(
            panels, [4, groups, groups, 16 * groups, panels.shape[1] - 4 - 18 * groups], dim=1
        )
        d, m = _as_bf16(units).unbind(1)
        low = low.reshape(-1, groups, 16)
        codes = torch.cat([low & 15, low >> 4], dim=2)
        if high_bits := self.bits - 4:
            high = high.reshape(-1, groups, 4 * high_bits, 1)
            shifts = torch.arange(0, 8, high_bits, dtype=torch.uint8, device=panels.device)
            codes |= ((high >> shifts) & (2**high_bits - 1)).flatten(2) << 4
        scale = d[:, None] * scales.float()
        centre = m[:, None] * centres.view(torch.int8).float()
        return scale.unsqueeze(-1) * (codes.float() - 2.0 ** (self.bits - 1)) + centre.unsqueeze(-1)


def _as_bf16(pairs: torch.Tensor) -> torch.Tensor:
    """Pairs of bytes [rows, 2 n] -> fp32 [rows, n]."""
    return pairs.contiguous().view(torch.bfloat16).float()
