"""An adapter in the folder of a model: plain transformers applies it, so it may not be passed over in silence."""

from __future__ import annotations

import os

from transformers.utils import is_peft_available

from lamina.checkpoint.mistaken import ADAPTER_CONFIG
from lamina.errors import UnsupportedError


def refuse_adapter(folder: str, model: str) -> str | None:
    """What is to be said of the adapter in a model's folder; None where there is none.

    Args:
        folder: of the small files.
        model: as it was asked for.

    Raises:
        UnsupportedError: plain transformers would apply it.
    """
    if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return None
    if not is_peft_available():
        return f"the adapter in {folder} is not applied: transformers does it where peft is installed, and it is not"
    raise UnsupportedError(
        f"{model} holds an adapter beside the model ({ADAPTER_CONFIG}), which transformers applies and Lamina does not "
        "by itself: move it and its weights to a folder of their own, then model.load_adapter(that folder) applies it"
    )
