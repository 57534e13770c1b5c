"""A gradient that would need a streamed weight is one clear error, however the forward pass was reached."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import lamina.store
from helpers.families import write_tiny
from helpers.gguf_files import write_model
from helpers.judge import minimum_of, plain_model, streamed_model
from helpers.quantize import fp8, write_quantized
from lamina import UnsupportedError
from lamina.hf.decoding.exact_rows import one_row
from lamina.tensors.packed import PackedTensor

pytestmark = pytest.mark.usefixtures("steadily")

IDS = torch.arange(3, 40)[None]
WHY = "gradient was asked for that needs weights which stream"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    write_tiny("llama", folder, dtype=request.param)
    return folder


def streamed(folder: Path) -> PreTrainedModel:
    model = streamed_model(folder, minimum_of(folder), draft=None)
    assert model.lamina.plan.streams
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def by_call(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def by_class(model: Any) -> torch.Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    loss: torch.Tensor = type(inner).forward(inner, input_ids=IDS, labels=IDS).loss
    return loss


def by_parts(model: Any) -> torch.Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=IDS).last_hidden_state
    return nn.functional.cross_entropy(inner.lm_head(hidden)[0, :-1].float(), IDS[0, 1:])


def by_another_forward(model: Any) -> torch.Tensor:
    """As trl's SFTTrainer does it: a forward of its own in place of the model's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(self: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        scores = nn.functional.linear(hidden, self.lm_head.weight)
        return types.SimpleNamespace(loss=nn.functional.cross_entropy(scores[0, :-1].float(), labels[0, 1:]))

    inner.forward = types.MethodType(forward, inner)
    loss: torch.Tensor = inner(input_ids=IDS, labels=IDS).loss
    return loss


def by_layers(model: Any) -> torch.Tensor:
    """Layer by layer, around every wrapper: the guard is on the weights."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    angles = inner.model.rotary_emb(hidden, positions)
    for layer in inner.model.layers:
        hidden = layer(hidden, position_embeddings=angles, attention_mask=None, position_ids=positions)
    return inner.lm_head(inner.model.norm(hidden)).float().pow(2).mean()


WAYS: dict[str, Callable[[Any], torch.Tensor]] = {
    "a call": by_call,
    "the class's forward": by_class,
    "its parts": by_parts,
    "another forward": by_another_forward,
    "layer by layer": by_layers,
}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_a_backward_pass_is_refused(folder: Path, way: str, adapter: bool) -> None:
    model, plain = streamed(folder), plain_model(folder)
    if adapter:
        model, plain = adapted(model), adapted(plain)
    loss = WAYS[way](model)
    assert torch.equal(loss.detach(), WAYS[way](plain).detach()), "the forward pass is plain transformers'"
    with pytest.raises(UnsupportedError, match=WHY) as caught:
        loss.backward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_asking_for_some_gradients_only_is_no_way_around(folder: Path, way: str) -> None:
    model = adapted(streamed(folder))
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name and ".0." in name]
    loss = WAYS[way](model)
    with pytest.raises(UnsupportedError, match=WHY):
        torch.autograd.grad(loss, trained, allow_unused=True)


def test_gradient_checkpointing_is_no_way_around(folder: Path) -> None:
    model = streamed(folder)
    layer = model.model.layers[1].mlp
    x = torch.ones(1, 3, 64, dtype=model.dtype, requires_grad=True)
    with pytest.raises(UnsupportedError, match=WHY):
        checkpoint(layer, x, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    model = streamed(folder).train()
    model.gradient_checkpointing_enable()
    loss = by_call(model)
    with pytest.raises(UnsupportedError, match=WHY):
        loss.backward()


def test_without_a_gradient_nothing_changes(folder: Path) -> None:
    model, plain = streamed(folder), plain_model(folder)
    with torch.no_grad():
        out = model(IDS)
    assert not out.logits.requires_grad and torch.equal(out.logits, plain(IDS).logits)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model.requires_grad_(False)
    assert not model(IDS).logits.requires_grad


def test_a_model_that_is_all_in_memory_trains_as_plain_transformers(folder: Path) -> None:
    model = streamed_model(folder, minimum_of(folder) + 300_000_000, draft=None)
    assert not model.lamina.plan.streams
    found = []
    for each in (adapted(model), adapted(plain_model(folder))):
        by_call(each).backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


@pytest.mark.parametrize("budget", ["minimum", "resident"])
def test_packed_weights_have_no_gradient_either(folder: Path, tmp_path: Path, budget: str) -> None:
    store = Path(lamina.store.split(str(folder), to=str(tmp_path / "store"), compression="8bit").folder)
    model = streamed_model(store, minimum_of(store) + (0 if budget == "minimum" else 300_000_000), draft=None)
    with torch.no_grad():
        wanted = model(IDS).logits
    assert torch.equal(model(IDS).logits.detach(), wanted), "a pass with gradients on is the same pass"
    for way in (by_call, by_class, by_parts):
        loss = way(adapted(model))
        with pytest.raises(UnsupportedError, match="gradient was asked for"):
            loss.backward()
        model = model if way is by_parts else streamed_model(store, model.lamina.plan.budget.memory_bytes, draft=None)


def of_store(folder: Path, compression: str) -> Path:
    write_tiny("qwen2", folder / "plain", dtype=torch.bfloat16)
    store = lamina.store.split(str(folder / "plain"), to=str(folder / "store"), compression=compression)
    return Path(store.folder)


def of_fp8(folder: Path) -> Path:
    write_tiny("qwen2", folder / "plain", dtype=torch.bfloat16)
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    write_quantized(folder / "plain", folder / "fp8", fp8((32, 32)), config)
    return folder / "fp8"


WITH_BIAS: dict[str, Callable[[Path], Path]] = {
    "8bit": lambda folder: of_store(folder, "8bit"),
    "lossless": lambda folder: of_store(folder, "lossless"),
    "gguf": lambda folder: write_model(folder, "qwen2moe", ["Q4_K", "Q8_0"]),
    "fp8": of_fp8,
}


@pytest.mark.parametrize("encoding", WITH_BIAS)
def test_packed_weights_with_biases_take_a_pass_with_gradients_on(encoding: str, tmp_path: Path) -> None:
    """All of it in memory: the pass is the same, its result looks as of plain weights, a backward pass is refused."""
    packed = WITH_BIAS[encoding](tmp_path)
    model = streamed_model(packed, 2_000_000_000, draft=None)
    assert not model.lamina.plan.streams
    assert any(isinstance(parameter, PackedTensor) for parameter in model.parameters())
    ways = (nullcontext(), IDS), (nullcontext(), IDS[:, :5]), (one_row(5, model.device), IDS[:, :5])
    for around, ids in ways:
        with around:
            logits = model(ids).logits
            with torch.no_grad():
                wanted = model(ids).logits
        assert logits.requires_grad and not wanted.requires_grad and torch.equal(logits.detach(), wanted)
        with pytest.raises(UnsupportedError, match="a gradient was asked for that needs packed weights"):
            logits.float().sum().backward()


def test_a_quick_product_is_no_way_around(tmp_path: Path) -> None:
    """That of a draft, should somebody call it with gradients on."""
    model = streamed_model(of_store(tmp_path, "4bit"), 2_000_000_000, draft=None)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quick = True
    x = torch.ones(1, 64, dtype=model.dtype, requires_grad=True)
    with pytest.raises(UnsupportedError, match="packed weights"):
        layer(x).float().sum().backward()


def test_a_weight_that_is_read_for_itself_has_its_right_gradient(folder: Path) -> None:
    """Outside a pass a weight is read into memory of its own, which autograd may keep."""
    model, plain = streamed(folder), plain_model(folder)
    found = []
    for each in (model, plain):
        x = torch.ones(2, 64, dtype=each.dtype, requires_grad=True)
        nn.functional.linear(x, each.model.layers[0].mlp.up_proj.weight).float().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])
