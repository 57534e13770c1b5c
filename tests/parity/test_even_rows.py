"""Products with rows of zeros added give every other row the bits that it has without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from helpers.families import input_ids, write_tiny
from helpers.judge import minimum_of, plain_model, steady, streamed_model
from lamina.tensors.padded_rows import FROM, MULTIPLE, even_rows

FAMILIES = "llama gpt2 phi3 gemma3_text mixtral qwen3_moe gpt_oss dbrx llama4_text deepseek_v3 mamba2 falcon".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 64), (1536, 2048), (64, 96)])
def test_a_row_does_not_depend_on_the_number_of_rows(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    for rows in (1, FROM - 1, FROM, 31, 32, 33, 47, 100, 131):
        x = torch.randn(1, rows, inputs).to(dtype)
        plain = functional.linear(x, weight, bias)
        with even_rows(rows, CPU):
            even = functional.linear(x, weight, bias)
        assert torch.equal(plain, even)
        assert even.shape == plain.shape and even.is_contiguous()


def test_only_many_rows_of_half_precision_are_added_to() -> None:
    seen = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is functional.linear:
                seen.append(args[0].shape[0])
            return super().__torch_function__(func, types, args, kwargs or {})

    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(4, 8, dtype=dtype).as_subclass(Seeing)
        for rows in (FROM - 1, FROM, MULTIPLE, MULTIPLE + 1):
            with even_rows(rows, CPU):
                functional.linear(torch.zeros(rows, 8, dtype=dtype), weight)
    assert seen == [FROM - 1, MULTIPLE, MULTIPLE, 2 * MULTIPLE, FROM - 1, FROM, MULTIPLE, MULTIPLE + 1]


@pytest.mark.parametrize(
    "family", [*FAMILIES[::3], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in FAMILIES[::3])]
)
def test_long_prompts(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, dtype=torch.bfloat16)
    plain = plain_model(tmp_path, family)
    least = minimum_of(tmp_path)
    for memory in (least + 2_000_000, 4 * least):
        model = streamed_model(tmp_path, memory)
        with model.lamina, torch.no_grad():
            for length in (FROM, 33, 61):
                ids = input_ids(plain.config, length=length, seed=length)
                assert torch.equal(model(ids).logits, plain(ids).logits), length
