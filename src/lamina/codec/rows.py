"""Products of up to `MOST_ROWS` rows with plain weights, whose bits do not depend on how many rows there are.

torch multiplies one row in another kernel than two, and those in another than seventeen, each with its own order of
sums. The kernels here (rows_kernels.c) have one order for all: a token has the same bits alone, in a batch and in a
draft that is verified. They go through the weight once, where it lies.
"""

from __future__ import annotations

import torch

from lamina.codec import native

MOST_ROWS = 64


def is_quick(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of a dtype, so that memory is what they wait for."""
    kernels = native.library()
    return kernels is not None and bool(kernels.lamina_rows_quick(native.type_code(dtype))) if _known(dtype) else False


def _known(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16, torch.float32)


def _fit(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these two may be multiplied here."""
    if weight.dim() != 2 or not weight.numel() or not x.numel() or not _is_like(weight, x):
        return False
    return x.shape[-1] == weight.shape[1] and x.numel() <= MOST_ROWS * weight.shape[1]


def _is_like(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    same = tensor.dtype == x.dtype and tensor.device.type == x.device.type == "cpu"
    return same and tensor.is_contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """`x @ weight.T + bias`, summed in fp32 and rounded once; None where the kernels do not take it.

    Args:
        x: shape (..., columns), with at most `MOST_ROWS` rows in all.
        weight: shape (rows, columns), of the dtype of `x`.
        bias: shape (rows,), of the same dtype.
    """
    if not _fit(x, weight) or (bias is not None and not _is_like(bias, x)):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    kernels = native.kernels_for(weight)
    if kernels is None:
        return None
    rows, columns = weight.shape
    tokens = x.numel() // columns
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    kernels.lamina_rows_linear(
        *(x.data_ptr(), tokens, weight.data_ptr(), rows, columns, None if bias is None else bias.data_ptr()),
        *(native.type_code(x.dtype), out.data_ptr(), rows, torch.get_num_threads()),
    )
    return out
