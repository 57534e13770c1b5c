"""How weights are stored in fewer bytes, and how they become numbers again.

A codec knows rows and columns, no model and no file. `codec_for` gives one by the name that a checkpoint's
`Encoding` holds.
"""

from lamina.codec.affine import Affine
from lamina.codec.codec import Codec, codec_for, register
from lamina.codec.lossless import Lossless

__all__ = ["AFFINE", "LOSSLESS", "Affine", "Codec", "Lossless", "codec_for", "register"]

AFFINE = {codec.name: codec for codec in (Affine(4), Affine(5), Affine(6), Affine(8))}
"""The codecs of scaled integers by name: `q4`, `q5`, `q6`, `q8`."""

LOSSLESS = Lossless()
"""The codec `bf16z`."""

for _affine in AFFINE.values():
    register(_affine)
register(LOSSLESS)
