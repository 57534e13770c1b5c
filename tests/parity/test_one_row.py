"""Within `one_row` a pass of several tokens gives the logits of as many passes of one token, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from helpers.families import MOE, input_ids, tiny_config, tiny_model
from helpers.judge import minimum_of, reads_on_demand, steady, streamed_model
from lamina.codec import AFFINE
from lamina.hf.decoding import exact_rows as module
from lamina.hf.decoding.exact_rows import covers, one_row
from lamina.plan import planner
from lamina.plan.schedule import PanelSpan
from lamina.tensors.packed import PackedTensor, Scratch
from lamina.tensors.padded_rows import even_rows

FAMILIES = """
    llama qwen2 qwen3 gemma2 gemma3_text mistral gpt2 phi3 mixtral qwen3_moe gpt_oss falcon bloom lfm2 deepseek_v3
    llama4_text mpt
""".split()
OTHERWISE_DIFFERENT = "llama qwen3 gpt2 phi3 mixtral lfm2 deepseek_v3".split()
CPU = torch.device("cpu")
LENGTHS = ((3, 4), (20, 13))  # new tokens, prompt


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady():
        yield


def singly_and_at_once(model: Any, count: int, prompt: int, *, rows: int | None = None) -> tuple[torch.Tensor, ...]:
    """Logits of passes of one token, and of one pass from the same state; `rows` enters `one_row`."""
    ids = input_ids(model.config, length=prompt + count, seed=count)
    with torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(ids[:, :prompt], past_key_values=cache)
        same = copy.deepcopy(cache)
        singly = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, prompt + count)]
        with one_row(rows, CPU) if rows else nullcontext():
            at_once = model(ids[:, prompt:], past_key_values=same).logits
    return torch.cat(singly, 1), at_once


def tiny(family: str, dtype: torch.dtype) -> Any:
    model = tiny_model(family, dtype=dtype)
    if family in MOE:
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("family", "dtype", "attention"),
    [(f, torch.bfloat16, None) for f in FAMILIES]
    + [("llama", torch.float16, None), ("qwen2", torch.float16, "eager"), ("llama", torch.float32, None)]
    + [(f, torch.float32, None) for f in ("gpt_oss", "mixtral", "qwen3_moe")]
    + [(f, torch.float16, "eager") for f in ("gpt2", "gemma3_text", "bloom")],
)
def test_families(family: str, dtype: torch.dtype, attention: str | None) -> None:
    model = tiny(family, dtype)
    if attention:
        model.set_attn_implementation(attention)
    why = covers(model)
    if why is not None and (dtype, attention) == (torch.float16, "eager") and "AVX512-FP16" in why:
        pytest.skip(why)
    assert why is None
    for count, prompt in LENGTHS:
        singly, at_once = singly_and_at_once(model, count, prompt, rows=count)
        assert torch.equal(singly, at_once), f"off by {(singly - at_once).abs().max().item():.3g}"


@pytest.mark.parametrize("family", OTHERWISE_DIFFERENT)
def test_other_kernels_have_other_bits(family: str) -> None:
    assert not torch.equal(*singly_and_at_once(tiny(family, torch.bfloat16), *LENGTHS[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that the order of a sum depends on the number of rows, and weights of several blocks."""
    monkeypatch.setattr(module, "BLOCK", 1 << 20)
    torch.manual_seed(0)
    weight, bias = torch.randn(700, 2304).to(dtype), torch.randn(700).to(dtype)
    for shape in ((1, 7, 2304), (7, 2304), (1, 20, 2304), (3, 2304)):
        x = torch.randn(shape).to(dtype)
        for own in (None, bias):
            # contiguous, as the states of a single token are: some processors take another way with a slice's strides
            ones = [one.clone(memory_format=torch.contiguous_format) for one in torch.split(x, 1, -2)]
            singly = torch.cat([functional.linear(one, weight, own) for one in ones], -2)
            for outer, inner in ((one_row, even_rows), (even_rows, one_row)):
                with outer(shape[-2], CPU), inner(shape[-2], CPU):
                    assert torch.equal(functional.linear(x, weight, own), singly)


def test_even_rows_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered inside of `one_row`, as a pass does, they would add rows that are computed in vain."""
    used: list[object] = []
    monkeypatch.setattr("lamina.tensors.padded_rows._linear", lambda x, weight, bias=None: used.append(x))
    x, weight = torch.zeros(20, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    with one_row(20, CPU), even_rows(20, CPU):
        functional.linear(x, weight)
    assert not used
    with even_rows(20, CPU):
        functional.linear(x, weight)
    assert used


def test_a_trial_sees_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = module._alike.__wrapped__
    assert trial(4, 64, 96, torch.float32, 0) in (True, False)
    plain = functional.linear

    def halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Several rows in another order: the second half of the columns first."""
        return plain(x, weight, bias) if len(x) == 1 else plain(x.flip(-1).float(), weight.flip(-1).float()).to(x.dtype)

    monkeypatch.setattr(module.functional, "linear", halves)
    for dtype in (torch.bfloat16, torch.float16):
        assert not trial(4, 64, 1024, dtype, torch.get_num_threads())


def test_products_that_are_no_linear() -> None:
    """Those of attention and experts that families write themselves, a row at a time."""
    torch.manual_seed(0)
    left, right = torch.randn(3, 20, 2304).bfloat16(), torch.randn(3, 2304, 64).bfloat16()
    flat, added = left[0].contiguous(), torch.randn(64).bfloat16()
    query, key = torch.randn(1, 4, 20, 16).half(), torch.randn(1, 4, 700, 16).half()
    seen = torch.ones(20, 700, dtype=torch.bool).tril(680)[None, None]
    calls: list[tuple[Any, Any]] = [
        (lambda i: torch.bmm(left[:, i], right), -2),
        (lambda i: left[:, i] @ right, -2),
        (lambda i: torch.addmm(added, flat[i], right[0]), -2),
        (lambda i: torch.baddbmm(added, left[:, i], right), -2),
    ]
    singly = [torch.cat([call(slice(i, i + 1)) for i in range(20)], at) for call, at in calls]
    attended = [
        functional.scaled_dot_product_attention(query[:, :, i : i + 1], *[key[:, :, : 681 + i]] * 2) for i in range(20)
    ]
    with one_row(20, CPU):
        for (call, _), one in zip(calls, singly, strict=True):
            assert torch.equal(call(slice(None)), one)
        at_once = functional.scaled_dot_product_attention(query, key, key, attn_mask=seen)
    assert torch.equal(at_once, torch.cat(attended, 2))


def test_packed_weights_are_multiplied_in_the_codecs_own_groups() -> None:
    torch.manual_seed(0)
    codec = AFFINE["q4"]
    rows, columns = 64, 256
    panels = codec.encode(torch.randn(rows, columns).bfloat16())
    memory = panels.reshape(-1).view(torch.uint8)
    span = PanelSpan("q4", 0, rows, 1, memory.numel() // rows, rows, 0, rows)
    weight = PackedTensor((rows, columns), torch.bfloat16, memory, (span,), Scratch())
    x = torch.randn(1, 20, columns).bfloat16()
    singly = torch.cat([functional.linear(one, weight) for one in x.split(1, 1)], 1)
    with one_row(20, CPU):
        assert torch.equal(functional.linear(x, weight), singly)


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_streamed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest budget, where wide weights pass by in blocks, once a pass."""
    monkeypatch.setattr(planner, "UNIT_SIZES", (0,))
    config = tiny_config(family)
    config.intermediate_size = 1536  # summed over, it depends on the number of rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = streamed_model(tmp_path, minimum_of(tmp_path))
    assert family in MOE or any(item.block for item in model.lamina.plan.items)
    with model.lamina, reads_on_demand() as demanded:
        for count, prompt in LENGTHS:
            assert torch.equal(*singly_and_at_once(model, count, prompt, rows=count))
    assert not demanded


def test_what_is_not_covered_is_told() -> None:
    assert "recurrent" in str(covers(tiny("qwen3_next", torch.bfloat16)))
    assert "eager" in str(covers(tiny_model("mixtral", dtype=torch.bfloat16)))
    model = tiny("phi3", torch.bfloat16)
    model.config.rope_parameters = {"rope_type": "longrope"}
    assert "length" in str(covers(model))


def test_nothing_is_left_behind() -> None:
    with pytest.raises(KeyError), one_row(4, CPU), one_row(3, CPU):
        assert ALL_ATTENTION_FUNCTIONS.get_interface is module._interface
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS.get_interface.__func__ is AttentionInterface.get_interface
    assert module._here.mode is None
