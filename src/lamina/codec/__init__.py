"""How weights are stored in fewer bytes, and how they become numbers again.

A codec knows rows and columns, no model and no file. `codec_for` gives one by the name that a checkpoint's
`Encoding` holds.
"""

from lamina.codec.codec import Codec, codec_for, register

__all__ = ["Codec", "codec_for", "register"]
