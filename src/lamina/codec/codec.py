"""What every codec can do, and where it is found."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from lamina.errors import UnsupportedError


class Codec:
    """Turns panels of bytes into rows of numbers. Stateless; called from several threads.

    Attributes:
        name: as an `Encoding` names it.
        linear_tokens: tokens up to which `linear` may have a quicker way; 0 where it has none.
        has_rows: there is a `unpack_rows`, for panels that may be as large as a weight.
        has_quick: there is a `linear_quick`.
    """

    name: str
    linear_tokens: int = 0
    has_rows: bool = False
    has_quick: bool = False

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        """Unpack whole panels.

        Args:
            panels: uint8 of shape (count, panel_bytes), contiguous, at any address.
            rows: of all these panels together; the last panel may hold fewer than the others.
            columns: of a row.
            out: shape (rows, columns), contiguous, in any floating dtype: what is unpacked is rounded to it.
        """
        raise NotImplementedError

    def unpack_rows(self, panels: torch.Tensor, first: int, rows: int, columns: int, out: torch.Tensor) -> None:
        """Unpack rows `first` to `first + rows` of these panels alone; the other arguments are those of `unpack`."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """Compute `x @ unpacked.T` without unpacking to memory, where that is quicker.

        Args:
            x: shape (tokens, columns), contiguous, floating.
            panels: as for `unpack`.
            rows: as for `unpack`.
            out: shape (tokens, rows), of x's dtype; rows of it may be strided, its last dimension is contiguous.

        Returns:
            False where this codec has no quicker way for so many tokens, this dtype or this device; then nothing
            was done.
        """
        return False

    def linear_quick(self, x: torch.Tensor, panels: torch.Tensor, rows: int, out: torch.Tensor) -> bool:
        """Compute about `x @ unpacked.T`, quicker and less exactly than `linear`: for drafts, which are checked anyway.

        Arguments and answer are those of `linear`. x may be rounded to 8 bits, in groups of columns; a row of `out`
        does not depend on the other rows of x.
        """
        return False


class LentName(str):
    """The name of a codec that one checkpoint brought: the codec is kept as long as the name.

    Attributes:
        codec: that codec.
    """

    codec: Codec


_codecs: dict[str, Codec] = {}
_lent: WeakValueDictionary[str, Codec] = WeakValueDictionary()


def register(codec: Codec) -> None:
    """Make a codec known by its name, for good."""
    _codecs[codec.name] = codec


def lend(codec: Codec, name: str) -> LentName:
    """A name by which a codec is known for as long as that name is kept."""
    lent = LentName(name)
    lent.codec = _lent.setdefault(name, codec)
    return lent


def codec_for(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnsupportedError: there is none.
    """
    codec = _codecs.get(name) or _lent.get(name)
    if codec is None:
        raise UnsupportedError(f"weights are stored as {name!r}, which this version cannot unpack: upgrade lamina")
    return codec
