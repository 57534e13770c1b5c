"""The logits of a pass that gives those of every token: as large as all that generation takes, for a long text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from lamina.hf.internals import arguments_of

KEEP = "logits_to_keep"
LOSS = 3 * 4  # bytes that a loss takes for each logit: in fp32, their exponents, the loss's own copy


class Logits:
    """How large a pass's logits are.

    Args:
        model: one that takes `logits_to_keep` is traced with the last token's logits alone, so that the others count
            here; one that does not is traced with all, and nothing counts here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        self._each = vocabulary * model.dtype.itemsize if KEEP in arguments_of(model) else 0
        self._loss = vocabulary * LOSS

    def of(self, rows: int, length: int, kwargs: Mapping[str, Any]) -> int:
        """Bytes of the logits of a pass beyond one token's.

        Args:
            rows: of the batch.
            length: tokens of each row.
            kwargs: of `forward`.
        """
        kept = kwargs.get(KEEP, 0)
        of_a_row = kept.numel() if isinstance(kept, torch.Tensor) else kept or length
        count = rows * min(of_a_row, length)
        loss = self._loss * count if kwargs.get("labels") is not None else 0
        return max(count - 1, 0) * self._each + loss
