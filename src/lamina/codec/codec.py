"""What every codec can do, and where it is found."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from lamina.errors import UnsupportedError


class Codec(Protocol):
    """Turns panels of bytes into rows of numbers. Stateless; called from several threads.

    Attributes:
        name: as an `Encoding` names it.
    """

    name: str

    def decode(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        """Decode whole panels.

        Args:
            panels: uint8 of shape (count, panel_bytes), contiguous, at any address.
            rows: of all these panels together; the last panel may hold fewer than the others.
            columns: of a row.
            out: shape (rows, columns), contiguous, in any floating dtype: what is decoded is rounded to it.
        """
        ...

    def linear(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """Compute `x @ decoded.T` without decoding to memory, where that is quicker.

        Args:
            x: shape (tokens, columns), contiguous, floating.
            panels: as for `decode`.
            rows: as for `decode`.
            out: shape (tokens, rows), of x's dtype; rows of it may be strided, its last dimension is contiguous.

        Returns:
            False where this codec has no quicker way for so many tokens, this dtype or this device; then nothing
            was done.
        """
        ...


@runtime_checkable
class ByRows(Protocol):
    """A codec that decodes some rows of a panel without the others: its panels may be as large as a weight."""

    def decode_rows(self, panels: torch.Tensor, first: int, rows: int, columns: int, out: torch.Tensor) -> None:
        """Decode rows `first` to `first + rows` of these panels; the other arguments are those of `decode`."""
        ...


@runtime_checkable
class Quick(Protocol):
    """A codec with a product that is quicker than its own and less exact: for drafts, which are checked anyway."""

    def linear_quick(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """Compute about `x @ decoded.T`; arguments and answer are those of `linear`.

        x may be rounded to 8 bits, in groups of columns; a row of `out` does not depend on the other rows of x.
        """
        ...


_codecs: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Make a codec known by its name."""
    _codecs[codec.name] = codec


def codec_for(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in _codecs:
        raise UnsupportedError(f"weights are stored as {name!r}, which this version cannot decode: upgrade lamina")
    return _codecs[name]
