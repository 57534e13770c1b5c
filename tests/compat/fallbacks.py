"""The second ways that the 66 families take, on every supported version of transformers: the one table of them.

docs/compatibility.md shows it. A family that takes one which is not here fails a test, and so does one that no longer
takes what is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MADE_UP = "was traced with made-up numbers where the model asks for real ones"
GUARDED = "layers that ask for real numbers were traced with made-up ones, or as one piece each"
OWN_CACHE = "the KV cache is of the model's own kind and counted as a traced pass leaves it"
STATE = "is off: this family keeps a state that cannot forget what was not accepted"
NO_CROP = "is off: this family keeps no cache that can forget what was not accepted"
NO_CACHE = "is off: there is no cache"

_EXPERTS = "its own experts ask which of them any token goes to"
_MIXERS = "mixers with a state: no drafts"

FALLBACKS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "bamba": {STATE: _MIXERS},
        "biogpt": {MADE_UP: "asks whether the attention mask hides anything"},
        "dbrx": {GUARDED: _EXPERTS},
        "falcon_h1": {STATE: _MIXERS},
        "falcon_mamba": {STATE: _MIXERS},
        "gpt2": {MADE_UP: "asks whether padding is among the tokens"},
        "jamba": {STATE: _MIXERS},
        "longcat_flash": {GUARDED: _EXPERTS},
        "mamba2": {STATE: _MIXERS},
        "minimax": {
            OWN_CACHE: "refuses a DynamicCache",
            NO_CROP: "its own cache has linear attention in it: no drafts",
        },
        "mpt": {NO_CACHE: "its config says use_cache=False: no drafts"},
        "qwen3_next": {STATE: _MIXERS},
    }
)
"""family -> words of the reason that Lamina gives -> why it is so in this family"""
