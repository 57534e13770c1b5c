"""The schedule of a pass, derived by running the model on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from helpers.families import tiny_model
from lamina.hf.recorder import layer_names
from lamina.hf.trace import Trace, trace
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
    (why,) = traced.fallbacks
    assert "could not be traced" in why and "RuntimeError: not on meta" in why
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


# -- experts


def experts_of(traced: Trace) -> dict[str, tuple[frozenset[str], int]]:
    """Uses and number of experts of the weights that experts modules hold, of the last layer that has some."""
    held = {n: (kinds, traced.experts.get(n, 0)) for n, kinds in traced.uses.items()
            if "shared" not in n and ("experts." in n or "expert_" in n) and "router" not in n
            and not n.endswith("experts.bias")}  # fmt: skip
    layers = [int(name.split("layers.")[-1].split(".")[0]) for name in held if "layers." in name]
    last = f"layers.{max(layers)}." if layers else "blocks.3."
    return {name.rsplit("experts.", 1)[-1]: said for name, said in held.items() if last in name}


def mixture_of(family: str, implementation: str = "eager") -> Any:
    model = tiny_model(family)
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = implementation
    return model


ONE = frozenset({"experts"})
WHOLE = frozenset({"other"})


@pytest.mark.parametrize(
    ("family", "held", "routed"),
    [
        ("mixtral", {"gate_up_proj": 4, "down_proj": 4}, 2),
        ("qwen3_moe", {"gate_up_proj": 4, "down_proj": 4}, 2),
        ("gpt_oss", {"gate_up_proj": 4, "gate_up_proj_bias": 4, "down_proj": 4, "down_proj_bias": 4}, 2),
        ("dbrx", {"mlp.v1": 4, "mlp.w1": 4, "mlp.w2": 4}, 2),  # one matrix that a view divides
        ("llama4_text", {"gate_up_proj": 4, "down_proj": 4}, 2),  # multiplied all at once, with zeros
        ("longcat_flash", {"gate_up_proj": 6, "down_proj": 4}, 2),  # experts that compute nothing
        ("jetmoe", {"input_linear.weight": 4, "output_linear.weight": 4}, 2),  # told how many tokens each has
    ],
)
def test_experts_that_are_used_one_at_a_time(family: str, held: dict[str, int], routed: int) -> None:
    traced = _traced(mixture_of(family))
    assert traced.traced
    assert experts_of(traced) == {name: (ONE, count) for name, count in held.items()}
    assert traced.routed and set(traced.routed.values()) == {routed}
    touching = {call.module for call in traced.root.walk() if set(call.touches) & traced.experts.keys()}
    assert touching == traced.routed.keys() or family == "dbrx"  # there an inner module only holds them


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_that_are_multiplied_all_at_once_are_whole(family: str) -> None:
    eager = experts_of(_traced(mixture_of(family)))
    model = mixture_of(family, "grouped_mm")
    traced = _traced(model)
    assert {kinds for kinds, _ in eager.values()} == {ONE}
    assert experts_of(traced) == dict.fromkeys(eager, (WHOLE, 0))
    assert not traced.experts and not traced.routed
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("mixtral", "mlp.gate"),
        ("gpt_oss", "mlp.router"),
        ("deepseek_v3", "mlp.gate"),
        ("llama4_text", ""),
        ("dbrx", ""),
    ],
)
def test_the_router_is_the_module_whose_ids_the_experts_are_given(family: str, router: str) -> None:
    traced = _traced(mixture_of(family))
    layers = {module.split("mlp.experts")[0] for module in traced.routed}
    assert traced.routers == ({f"{layer}mlp.experts": f"{layer}{router}" for layer in layers} if router else {})


class Mixture(nn.Module):
    """A layer whose code uses the experts of one weight in a way of its own."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.held = nn.Parameter(torch.zeros(*shape))
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.use(self.held, x, self.router(x).topk(3, dim=-1)[1])
        return x


def traced_use(use: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], *shape: int) -> Trace:
    model = Model(Mixture(use, *shape))
    model.config.num_experts = 4
    traced = _traced(model)
    assert traced.traced, traced.fallbacks
    return traced


HELD = "layers.0.inside.held"


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x, ids: w[2],
        lambda w, x, ids: w[torch.zeros((), dtype=torch.long, device="meta")],
        lambda w, x, ids: [nn.functional.linear(x, w[i]) for i in range(4)],
        lambda w, x, ids: torch.bmm(x.new_empty(4, 2, 8), w),
        lambda w, x, ids: x.new_empty(4, 2, 8).bmm(w),
        lambda w, x, ids: (w.view(4, 8, 8)[1], w.reshape(-1, 8, 8)[2]),
    ],
)
def test_ways_to_use_one_expert(use: Any) -> None:
    traced = traced_use(use, 4, 8, 8)
    assert (traced.uses[HELD], traced.experts[HELD]) == (ONE, 4)
    assert traced.routed["layers.0.inside"] == 3, "what the last choice was of"


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x, ids: w[1:3],
        lambda w, x, ids: w[ids],
        lambda w, x, ids: w[torch.empty(4, dtype=torch.bool, device="meta")],
        lambda w, x, ids: w.sum(),
        lambda w, x, ids: torch.matmul(x.new_empty(4, 2, 8), w),
        lambda w, x, ids: torch.bmm(w, x.new_empty(4, 8, 2)),
        lambda w, x, ids: torch.einsum("efh,bh->ebf", w, x.new_empty(2, 8)),
        lambda w, x, ids: w.view(32, 8) + 1,
        lambda w, x, ids: w.transpose(1, 2)[0],
        lambda w, x, ids: (w[0], w.sum()),
        lambda w, x, ids: (w[0], w.view(2, 16, 8)[0]),  # two numbers of experts
    ],
)
def test_ways_to_use_them_all(use: Any) -> None:
    traced = traced_use(use, 4, 8, 8)
    assert "other" in traced.uses[HELD]


def test_a_matrix_whose_rows_a_view_divides_into_experts() -> None:
    traced = traced_use(lambda w, x, ids: [w.view(-1, 8, 8)[i] for i in range(4)], 32, 8)
    assert (traced.uses[HELD], traced.experts[HELD]) == (ONE, 4)


def test_a_view_that_nobody_picks_from_is_the_whole_weight() -> None:
    assert traced_use(lambda w, x, ids: w.view(-1, 8, 8), 32, 8).uses[HELD] == WHOLE
    assert traced_use(lambda w, x, ids: w.view(-1, 8, 8).sum(), 32, 8).uses[HELD] == WHOLE


def test_a_product_of_as_many_matrices_as_no_config_names_is_no_product_of_experts() -> None:
    assert traced_use(lambda w, x, ids: torch.bmm(x.new_empty(5, 2, 8), w), 5, 8, 8).uses[HELD] == WHOLE


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
