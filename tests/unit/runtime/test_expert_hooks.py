"""Between transformers' code and the experts: who is routed to, and what stands in a module for its experts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.homes import InMemory
from lamina.hf.experts import picks, routed_tokens, routes
from lamina.runtime.expert_hooks import ExpertHooks
from lamina.tensors.disk import DiskTensor
from lamina.tensors.row_blocks import Blocks

STATES, WEIGHTS = torch.zeros(3, 8), torch.ones(3, 2)


def ids(*rows: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


# -- who is routed to


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_of_each_token_are_counted(dtype: torch.dtype) -> None:
    chosen = ids([3, 0], [0, 1], [0, 3], dtype=dtype)
    wanted = {0: 3, 1: 1, 3: 2}, 3
    assert routed_tokens((STATES, chosen, WEIGHTS), {}, 4) == wanted
    assert routed_tokens((STATES,), {"top_k_index": chosen, "top_k_weights": WEIGHTS}, 4) == wanted
    assert routed_tokens((), {"x": STATES, "ids": chosen}, 4) == wanted
    found = routed_tokens((STATES, chosen), {}, 4)
    assert found is not None and list(found[0]) == [0, 1, 3]


def test_ids_that_are_no_expert_are_left_out() -> None:
    """Masked tokens, experts that compute nothing, and -1 for nowhere."""
    assert routed_tokens((STATES, ids([4, 0], [-1, 7], [-1, -1])), {}, 4) == ({0: 1}, 3)
    assert routed_tokens((STATES, ids([4, 4])), {}, 4) == ({}, 1)


def test_ids_of_rows_and_tokens() -> None:
    chosen = torch.tensor([[[1, 2], [1, 0]], [[3, 3], [1, 2]]])
    assert routed_tokens((STATES, chosen), {}, 4) == ({0: 1, 1: 3, 2: 2, 3: 2}, 4)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
def test_no_tokens_or_no_experts(shape: tuple[int, ...]) -> None:
    chosen = torch.zeros(shape, dtype=torch.long)
    assert routed_tokens((STATES, chosen), {}, 4) == ({}, shape[0] if shape[1] else 0)


def test_a_list_of_the_tokens_of_each_expert() -> None:
    assert routed_tokens((STATES, [2, 0, 0, 3]), {}, 4) == ({0: 2, 3: 3}, 5)
    assert routed_tokens((STATES,), {"expert_size": [0, 0, 0, 0]}, 4) == ({}, 0)
    assert routed_tokens((STATES, [9, 9], [2, 0, 0, 3]), {}, 4) == ({0: 2, 3: 3}, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (STATES,),
        (STATES, WEIGHTS),
        (STATES, torch.tensor([0, 1, 2])),  # one dimension: positions, not choices
        (STATES, torch.ones(3, 4, dtype=torch.bool)),
        (STATES, torch.ones(3, 4, dtype=torch.complex64)),
        (STATES, [1, 2, 3]),  # of another number of experts
        (STATES, [1.0, 2.0, 3.0, 4.0]),
        (STATES, (1, 2, 3, 4)),
        (STATES, None, "eager"),
        (),
    ],
)
def test_arguments_that_do_not_tell(arguments: tuple[Any, ...]) -> None:
    assert routed_tokens(arguments, {}, 4) is None
    assert routed_tokens((), {str(i): value for i, value in enumerate(arguments)}, 4) is None


def test_experts_are_recognised_by_ids_and_as_many_weights() -> None:
    chosen = ids([3, 0], [0, 1], [0, 3])
    assert routes((STATES, chosen, WEIGHTS)) and routes([WEIGHTS, chosen])
    assert not routes((STATES, chosen)) and not routes((STATES, WEIGHTS)) and not routes(())
    assert picks((STATES, WEIGHTS, chosen)) is chosen


# -- what stands in for the weights


class Asked:
    """A stand-in for a weight with `count` experts; what was asked of it.

    Attributes:
        experts: that were given one at a time.
        whole: how often all of it was read.
    """

    def __init__(self, *shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.experts: list[int] = []
        self.data = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        disk = DiskTensor.of("w", shape, dtype)
        disk.home = self.home = InMemory(self.data)
        self.weight = Blocks(disk)
        self.weight.experts, self.weight.expert = count, self._expert

    @property
    def whole(self) -> int:
        return self.home.reads

    def _expert(self, index: int) -> torch.Tensor:
        self.experts.append(index)
        rows = self.data.shape[0] // self.weight.experts
        return self.data[index * rows : (index + 1) * rows]


@pytest.mark.parametrize(
    ("index", "expert"),
    [(0, 0), (3, 3), (-1, 3), (-4, 0), (torch.tensor(2), 2), (torch.tensor(-2), 2), (torch.tensor(1).int(), 1)],
    ids=str,
)
def test_a_number_picks_one_expert(index: Any, expert: int) -> None:
    asked = Asked(4, 6, 5)
    assert torch.equal(asked.weight[index], asked.data[expert])
    assert (asked.experts, asked.whole) == ([expert], 0)


def test_the_index_that_a_model_s_own_loop_makes() -> None:
    asked = Asked(4, 6, 5)
    for found in torch.tensor([0, 5, 0, 1]).nonzero():
        x = torch.ones(2, 5)
        assert torch.equal(
            nn.functional.linear(x, asked.weight[found[0]]), nn.functional.linear(x, asked.data[found[0]])
        )
    assert (asked.experts, asked.whole) == ([1, 3], 0)


@pytest.mark.parametrize("index", [4, -5, torch.tensor(4), torch.tensor(-5)], ids=str)
def test_a_number_out_of_range_is_an_index_error(index: Any) -> None:
    asked = Asked(4, 6, 5)
    with pytest.raises(IndexError):
        asked.weight[index]
    assert asked.experts == []


@pytest.mark.parametrize(
    "index",
    [
        True,
        False,
        torch.tensor(True),
        slice(1, 3),
        slice(None),
        (1, 2),
        (0, slice(None), 1),
        None,
        [0, 2],
        torch.tensor([1]),
        torch.tensor([[1, 2]]),
        torch.tensor([True, False, True, False]),
    ],
    ids=str,
)
def test_any_other_index_reads_the_whole_weight(index: Any) -> None:
    asked = Asked(4, 6, 5)
    assert torch.equal(asked.weight[index], asked.data[index])
    assert asked.experts == [] and asked.whole


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.sum(),
        lambda w: w.transpose(1, 2),
        lambda w: w.detach().clone(),
        lambda w: torch.stack([w, w]),
        lambda w: torch.einsum("efh,h->ef", w, torch.ones(5)),
        lambda w: torch.ones(4, 2, 6) @ w,
        lambda w: torch.bmm(torch.ones(4, 2, 6), w),
        lambda w: torch.bmm(w, torch.ones(4, 5, 2)),
        lambda w: list(w),
        lambda w: w.unbind(0)[2],
        lambda w: w.to(torch.float64),
    ],
)
def test_any_other_use_reads_the_whole_weight(use: Callable[[torch.Tensor], Any]) -> None:
    asked = Asked(4, 6, 5)
    got, wanted = use(asked.weight), use(asked.data)
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, list) else [(got, wanted)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert asked.experts == [] and asked.whole


def test_what_is_asked_of_a_weight_without_its_values_reads_nothing() -> None:
    asked = Asked(4, 6, 5)
    weight = asked.weight
    assert (weight.shape, weight.dtype, weight.dim(), weight.numel(), len(weight)) == (
        (4, 6, 5),
        torch.float32,
        3,
        120,
        4,
    )
    assert weight.device.type == "cpu" and weight.size(1) == 6 and "Blocks" in repr(weight)
    assert not isinstance(weight[1], Blocks)
    assert asked.whole == 0


@pytest.mark.parametrize("reshape", ["view", "reshape"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (-1, 3, 5), (4, -1, 5), (4, 15), (4, 3, 5, 1)], ids=str)
def test_rows_that_are_divided_into_experts(reshape: str, shape: tuple[int, ...]) -> None:
    asked = Asked(12, 5)
    divided = getattr(asked.weight, reshape)(*shape)
    assert divided.shape == asked.data.view(shape).shape and divided.dtype == asked.data.dtype
    for index in (2, torch.tensor(0), -1):
        assert torch.equal(divided[index], asked.data.view(shape)[index])
    assert (asked.experts, asked.whole) == ([2, 0, 3], 0)
    assert torch.equal(divided[1:3], asked.data.view(shape)[1:3]) and asked.whole == 1
    assert torch.equal(divided + 1, asked.data.view(shape) + 1)


def test_a_shape_given_as_one_argument_and_a_view_of_a_view() -> None:
    asked = Asked(12, 5)
    assert torch.equal(asked.weight.view((4, 3, 5))[1], asked.data.view(4, 3, 5)[1])
    assert torch.equal(asked.weight.view(torch.Size((-1, 3, 5))).view(4, 15)[3], asked.data.view(4, 15)[3])
    assert (asked.experts, asked.whole) == ([1, 3], 0)


@pytest.mark.parametrize("shape", [(12, 5), (6, 2, 5), (3, 4, 5), (60,), (1, 12, 5)], ids=str)
def test_another_shape_reads_the_whole_weight(shape: tuple[int, ...]) -> None:
    asked = Asked(12, 5)
    assert torch.equal(asked.weight.view(shape)[0], asked.data.view(shape)[0])
    assert asked.experts == [] and asked.whole


def test_a_row_of_an_undivided_weight_is_not_an_expert() -> None:
    asked = Asked(12, 5)
    assert torch.equal(asked.weight[1], asked.data[1])
    assert asked.experts == []


def test_a_shape_that_does_not_fit_is_torch_s_own_error() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        Asked(12, 5).weight.view(5, 5)


def test_a_view_as_another_type_is_of_that_type() -> None:
    asked = Asked(4, 6, 5)
    assert torch.equal(asked.weight.view(torch.int32)[1], asked.data.view(torch.int32)[1])


def test_arguments_by_name() -> None:
    asked = Asked(4, 6, 5)
    x = torch.ones(4, 2, 6)
    assert torch.equal(torch.bmm(input=x, mat2=asked.weight), torch.bmm(x, asked.data))


# -- all experts multiplied at once


class Batched(Asked):
    """As the engine computes it: only the experts that are given anything."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape, count=shape[0])
        self.weight.batched = self._batched

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(*x.shape[:2], self.data.shape[2])
        for index in (x != 0).flatten(1).any(1).nonzero().flatten().tolist():
            out[index] = x[index] @ self._expert(index)
        return out


@pytest.mark.parametrize("multiply", [torch.bmm, lambda x, w: x.bmm(w), lambda x, w: torch.bmm(x, w)])
def test_what_is_multiplied_with_zero_is_not_read(multiply: Callable[..., torch.Tensor]) -> None:
    asked = Batched(4, 6, 5)
    x = torch.zeros(4, 3, 6)
    x[1, 2], x[3] = 1.0, 2.0
    assert torch.equal(multiply(x, asked.weight), torch.bmm(x, asked.data))
    assert (asked.experts, asked.whole) == ([1, 3], 0)


def test_a_product_from_the_left_or_of_two_weights_reads_them_whole() -> None:
    asked = Batched(4, 5, 5)
    x = torch.zeros(4, 3, 5)
    assert torch.equal(torch.bmm(asked.weight, x.mT), torch.bmm(asked.data, x.mT))
    assert torch.equal(torch.bmm(asked.weight, asked.weight), torch.bmm(asked.data, asked.data))
    assert asked.experts == []
    assert torch.equal(torch.matmul(x, asked.weight), torch.matmul(x, asked.data))


class Told:
    """What the engine asks of its experts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[int, int], int]] = []
        self.stream = self

    def routed(self, module: str) -> bool:
        return any(told == module for told, _, _ in self.calls)

    def route(self, module: str, tokens: dict[int, int], total: int) -> None:
        self.calls.append((module, tokens, total))


@pytest.mark.parametrize("value", [1.0, -1e-30, float("nan"), float("inf")])
def test_the_engine_multiplies_with_the_experts_that_are_given_anything(value: float) -> None:
    data, told, asked = torch.randn(4, 6, 5), Told(), []

    def expert(index: int) -> torch.Tensor:
        asked.append(index)
        return data[index : index + 1]

    told._one = lambda module, weight: expert  # type: ignore[attr-defined]
    batched = ExpertHooks._all(told, "m", SimpleNamespace(name="w", shape=data.shape))  # type: ignore[arg-type]
    x = torch.zeros(4, 3, 6)
    x[1, 2, 4], x[3, 0], x[3, 1], x[0] = value, 2.0, 3.0, -0.0
    for _ in range(2):
        assert torch.equal(batched(x).nan_to_num(7.0), torch.bmm(x, data).nan_to_num(7.0))
    assert told.calls == [("m", {1: 1, 3: 2}, 3)] and asked == [1, 3, 1, 3]
    assert torch.equal(batched(torch.zeros(4, 3, 6)), torch.zeros(4, 3, 5)) and len(asked) == 4
