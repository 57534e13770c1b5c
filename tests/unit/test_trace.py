"""The schedule of a pass, derived by running the model on tensors without memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from families import tiny_model
from lamina.model.trace import Trace, layer_names, trace
from lamina.plan.schedule import Call


class Gate(nn.Module):
    """A linear that its parent multiplies with, and one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.sigmoid(x @ self.gate.weight.T) * x)


class Layer(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.experts = nn.Parameter(torch.zeros(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            x = nn.functional.linear(x, self.experts[index])
        return x + self.inside(x)


class Model(nn.Module):
    """Like a language model of transformers, as far as the trace knows one."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = nn.Embedding(32, 8)
        self.positions = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(Layer(module) for module in inside)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _traced(model: Any) -> Trace:
    return trace(model)


def test_the_calls_are_in_order_with_what_each_ones_own_code_touches() -> None:
    traced = _traced(Model(Gate(), Gate()))
    assert traced.traced
    layers = tuple(
        Call(
            f"layers.{i}",
            (f"layers.{i}.experts",),
            (
                Call(
                    f"layers.{i}.inside",
                    (f"layers.{i}.inside.gate.weight",),
                    (Call(f"layers.{i}.inside.out", (f"layers.{i}.inside.out.weight", f"layers.{i}.inside.out.bias")),),
                ),
            ),
        )
        for i in range(2)
    )
    calls = (Call("embed", ("embed.weight",)), *layers, Call("head", ("embed.weight",)))
    assert traced.root == Call("", ("positions.weight",), calls)


def test_uses_say_how_a_weight_may_be_consumed() -> None:
    traced = _traced(Model(Gate()))
    assert traced.uses == {
        "embed.weight": {"embedding", "linear"},
        "positions.weight": {"other"},
        "layers.0.experts": {"experts"},
        "layers.0.inside.gate.weight": {"other"},
        "layers.0.inside.out.weight": {"linear"},
        "layers.0.inside.out.bias": {"other"},
    }


def test_a_tied_table_is_a_lookup_in_one_module_only() -> None:
    assert _traced(Model(Gate())).lookups == {("embed", "embed.weight")}


def test_layers_are_the_members_of_the_outermost_lists() -> None:
    model = Model(nn.Sequential(), Gate())
    model.layers[0].inside = nn.ModuleList([Gate()])
    assert layer_names(model) == {"layers.0", "layers.1"}


class Asks(Gate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


def test_a_module_that_asks_for_a_value_needs_all_its_weights() -> None:
    model = Model(Gate(), Asks())
    forward = model.layers[1].inside.forward
    traced = _traced(model)
    assert traced.traced
    names = ("gate.weight", "out.weight", "out.bias")
    asked = next(call for call in traced.root.walk() if call.module == "layers.1.inside")
    assert asked == Call("layers.1.inside", tuple(f"layers.1.inside.{name}" for name in names))
    assert traced.uses["layers.1.inside.out.weight"] == {"other"}
    assert traced.uses["layers.0.inside.out.weight"] == {"linear"}
    assert model.layers[1].inside.forward == forward  # the guard is gone


@pytest.mark.parametrize(
    "question",
    [
        lambda ids: bool((ids == 1).any()),
        lambda ids: int(ids.max()) > 3,
        lambda ids: 5 in ids,
        lambda ids: ids.max().item() <= 64,
        lambda ids: len(ids[0].tolist()) > 3,
        lambda ids: (ids == 0).nonzero().shape[0] > 3,
        lambda ids: torch.nonzero(ids, as_tuple=True)[0].shape[0] > 3,
        lambda ids: torch.where(ids == 0)[0].shape[0] > 3,
        lambda ids: ids[ids == 0].shape[0] > 3,
    ],
)
def test_a_model_that_asks_for_values_outside_its_layers_is_answered(question: Any) -> None:
    class Asking(Model):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            question(input_ids)
            return super().forward(input_ids)

    traced = _traced(Asking(Gate()))
    assert traced.traced
    assert traced.root == _traced(Model(Gate())).root


def test_what_cannot_be_traced_goes_in_the_order_of_definition() -> None:
    class Refuses(Model):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            raise RuntimeError("not on meta")

    traced = _traced(Refuses(Gate()))
    assert not traced.traced
    assert traced.why_not == "RuntimeError: not on meta"
    assert [call.module for call in traced.root.calls] == ["embed", "positions", "layers", "head", "unused"]
    assert traced.uses["embed.weight"] == {"embedding", "linear"}
    assert ("embed", "embed.weight") in traced.lookups
    assert ("head", "embed.weight") not in traced.lookups


def test_the_trace_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    implementation = model.config._experts_implementation
    _traced(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.config._experts_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.layers.modules())


# -- activations and cache


def _llama(layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _most_alive(model: LlamaForCausalLM, tokens: int) -> int:
    """Bytes that a prefill has allocated at its highest, its cache included."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(ids, logits_to_keep=1)
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 512, 1024])
def test_activations_are_not_underestimated(tokens: int) -> None:
    model = _llama()
    traced = _traced(model)
    measured = _most_alive(model, tokens)
    assert measured > 0
    assert traced.activations(tokens) + traced.cache(tokens) >= measured
    assert traced.activations(tokens) < 8 * measured + 4_000_000  # and not absurdly over


@pytest.mark.parametrize("tokens", [16, 100, 512])
def test_the_cache_is_what_the_config_says(tokens: int) -> None:
    model = _llama(3)
    wanted = 3 * 2 * 2 * 64 * tokens * 4  # layers x (keys, values) x heads x head size x tokens x fp32
    got = _traced(model).cache(tokens)
    assert wanted <= got <= 1.1 * wanted + 100_000


def test_more_tokens_never_need_less() -> None:
    traced = _traced(tiny_model("deepseek_v3"))
    for estimate in (traced.activations, traced.cache):
        values = [estimate(tokens) for tokens in (1, 2, 8, 16, 17, 32, 63, 64, 65, 100, 1000, 10_000)]
        assert values == sorted(values)
        assert values[-1] > values[0]


def test_a_shrinking_measurement_is_held() -> None:
    traced = Trace(Call(""), {}, activation_bytes={16: 100, 32: 300, 64: 200}, cache_bytes={16: 16, 32: 32, 64: 64})
    assert traced.cache(8) == 16
    assert traced.cache(128) == 128
    assert traced.activations(64) == traced.activations(1000) == traced.activations(32)


def test_a_cache_of_transformers_can_be_made_from_a_config() -> None:
    assert DynamicCache(config=_llama().config) is not None
