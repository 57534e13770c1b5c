"""Ids that look up rows of a table, checked before anything is read: what lies beside a table on disk is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lamina.errors import RequestError, TokenError

TOKENS = "take the ids from the model's own tokenizer, or give it more rows with model.resize_token_embeddings"
OTHERS = "the text is longer than the model has positions, or an id of another kind than tokens is wrong"


def check_ids(ids: torch.Tensor, rows: int, table: str, advice: Callable[[], str] = lambda: TOKENS) -> None:
    """Refuse ids that are no rows of a table; a negative one is none.

    Args:
        ids: integers of any shape.
        rows: of the table.
        table: what the error calls it.
        advice: gives what to do.

    Raises:
        TokenError: the first id that is out of range, and where it is.
        RequestError: they are no 32- or 64-bit integers.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise RequestError(f"{table} was looked up with {ids.dtype} of shape {tuple(ids.shape)}: ids are torch.int64")
    if not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < rows:
        return
    position = ((ids < 0) | (ids >= rows)).nonzero()[0].tolist()
    raise TokenError(
        f"id {int(ids[tuple(position)])} at position {position} is no row of {table}, which has {rows} of them "
        f"(0 to {rows - 1}): {advice()}"
    )


def check_tokens(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: IndexError) -> None:
    """Say which token of a call is outside of the vocabulary, if one is.

    Args:
        error: what torch said.

    Raises:
        TokenError: one is.
    """
    ids, rows = kwargs.get("input_ids", args[0] if args else None), vocabulary_rows(model)
    if isinstance(error, TokenError) or rows is None or not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        return
    try:
        check_ids(ids.long(), rows, "the table of token embeddings")
    except TokenError as found:
        raise found from error


def vocabulary_rows(model: Any) -> int | None:
    """Rows of the table that the model's tokens are looked up in; None where there is no such table."""
    with contextlib.suppress(NotImplementedError):
        weight = getattr(model.get_input_embeddings(), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return weight.shape[0]
    return None
