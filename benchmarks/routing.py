"""Records which experts a mixture-of-experts model wants, text by text, for `eviction.py record` (see there)."""

import argparse
import json
import pydoc_data.topics
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import HERE, MeasuringError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

REPOSITORY = HERE.parent
CHAT = "I have three days in Lisbon with two children and it will rain. Plan them, and tell me why for each stop."


@dataclass
class Router:
    """logits = weight @ hidden + bias, the greatest `top_k` of them chosen."""

    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight, self.bias)


@dataclass
class Layer:
    """One layer's MoE block: the norm before it, its gate, its experts; `before` is what entered the norm last."""

    norm: Any
    gate: Any
    experts: Any
    router: Router
    before: torch.Tensor | None = None


def find_layers(model: Any) -> list[Layer]:
    found = []
    for name, experts in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        decoder = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        weight = block.gate.weight.detach().float()
        router = Router(weight, torch.zeros(len(weight)), block.gate.top_k)
        found.append(Layer(decoder.post_attention_layernorm, block.gate, experts, router))
    if not found:
        raise MeasuringError("this model has no module called experts: it is not a mixture of experts")
    return found


def calibrate(model: Any, tokenizer: Any, layers: list[Layer], tokens: int = 2048) -> list[torch.Tensor]:
    """What enters each gate, [tokens, hidden], over text from Python's own library: half prose, half code."""
    half = tokens // 2
    prose = tokenizer(" ".join(pydoc_data.topics.topics.values())[:40000])["input_ids"][:half]
    code = tokenizer(Path(textwrap.__file__).read_text())["input_ids"][:half]
    seen: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks = [
        layer.gate.register_forward_pre_hook(lambda _gate, args, kept=kept: kept.append(args[0].float()))
        for layer, kept in zip(layers, seen, strict=True)
    ]
    for ids in (prose, code):
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat([part.flatten(0, -2) for part in kept]) for kept in seen]


def fit_router(kind: str, seen: torch.Tensor, experts: int, top_k: int, seed: int) -> Router:
    dice = torch.Generator().manual_seed(seed)
    mean, scale = seen.mean(0), seen.std(0) + 1e-6
    directions = torch.randn(experts, seen.shape[1], generator=dice)
    if kind == "whitened":
        variances, axes = torch.linalg.eigh((seen - mean).T @ (seen - mean) / len(seen))
        whitener = axes @ torch.diag((variances + 0.01 * variances.mean()).rsqrt()) @ axes.T
        weight = directions @ whitener / seen.shape[1] ** 0.5
        return Router(weight, -weight @ mean, top_k)
    points = F.normalize((seen - mean) / scale, dim=1)
    centroids = points[torch.randperm(len(points), generator=dice)[:experts]]
    for _ in range(20):
        nearest = (points @ centroids.T).argmax(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = F.normalize(torch.where(sums.any(1, keepdim=True), sums, centroids), dim=1)
    weight = centroids / scale
    return balance(Router(weight, -weight @ mean, top_k), seen)


def balance(router: Router, seen: torch.Tensor) -> Router:
    """Move the bias until the experts are chosen about equally often (Wang et al. 2024, loss-free balancing)."""
    logits = router.logits(seen)
    bias = torch.zeros_like(router.bias)
    step = logits.std() * 0.1
    for turn in range(300):
        load = torch.bincount((logits + bias).topk(router.top_k).indices.flatten(), minlength=len(bias)).float()
        bias += step * 0.99**turn * (1 - load / load.mean()).clamp(-1, 1)
    return Router(router.weight, router.bias + bias, router.top_k)


@dataclass
class Recorder:
    """Hooks that route, write down what was routed, and judge the look-ahead while decoding.

    passes[i] = [tokens, [{expert: tokens routed to it} for each layer]]
    """

    layers: list[Layer]
    passes: list[tuple[int, list[dict[int, int]]]] = field(default_factory=list)
    found: dict[str, list[float]] = field(default_factory=dict)

    def attach(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.norm.register_forward_pre_hook(lambda _norm, args, layer=layer: self.enter(layer, args[0]))
            layer.gate.register_forward_hook(lambda _gate, args, _out, layer=layer: self.route(layer, args[0]))
            layer.experts.register_forward_pre_hook(lambda _e, args, index=index: self.write(index, args))

    def enter(self, layer: Layer, hidden: torch.Tensor) -> None:
        layer.before = hidden.detach()[0, -1:]

    def route(self, layer: Layer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = layer.router.logits(hidden.reshape(-1, hidden.shape[-1]))
        chosen = logits.topk(layer.router.top_k)
        return logits, chosen.values.softmax(-1).to(hidden.dtype), chosen.indices

    def write(self, index: int, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, chosen, weights = args
        if index == 0:
            self.passes.append((len(chosen), []))
        experts, tokens = chosen.unique(return_counts=True)
        self.passes[-1][1].append(dict(zip(experts.tolist(), tokens.tolist(), strict=True)))
        if len(chosen) == 1:
            self.judge(index, set(chosen[0].tolist()))
        return hidden, chosen % self.layers[index].experts.num_experts, weights

    def judge(self, index: int, wanted: set[int]) -> None:
        """Recall of the router's first k and 2k, one and two layers early; and of the last token's experts."""
        layer, k = self.layers[index], self.layers[index].router.top_k
        for ahead in (1, 2):
            if index >= ahead:
                early = self.layers[index - ahead].before
                order = layer.router.logits(layer.norm.forward(early))[0].argsort(descending=True).tolist()
                for some in (1, 2):
                    recall = len(wanted & set(order[: some * k])) / len(wanted)
                    self.found.setdefault(f"{ahead} ahead, {some}k", []).append(recall)
        last = self.passes[-2][1][index] if self.passes[-2][0] == 1 else {}
        if last:
            self.found.setdefault("again", []).append(len(wanted & last.keys()) / len(wanted))


@dataclass(frozen=True)
class Part:
    """A prompt and how its decoding goes on: along `forced`, or chosen at a temperature (0 is greedy)."""

    prompt: list[int]
    steps: int
    forced: list[int] | None = None
    temperature: float = 0.0


def texts(tokenizer: Any) -> dict[str, list[Part]]:
    def ids(path: str) -> list[int]:
        return list(tokenizer((REPOSITORY / path).read_text())["input_ids"])

    def forced(path: str, prompt: int, steps: int) -> Part:
        return Part(ids(path)[:prompt], steps, ids(path)[prompt : prompt + steps])

    turn = [{"role": "user", "content": CHAT}]
    chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    prose, code = "docs/how-it-works.md", "benchmarks/capped.py"
    mixed = [forced("LICENSE", 150, 120), forced("benchmarks/memory.py", 150, 120), Part(chat, 120, None, 0.8)]
    return {
        "prose": [forced(prose, 300, 400)],
        "code": [forced(code, 300, 400)],
        "chat": [Part(chat, 400, None, 0.8)],
        "greedy": [Part(ids(prose)[:300], 400)],
        "mixed": [*mixed, forced("README.md", 150, 120)],
    }


def decode(model: Any, part: Part) -> None:
    """The prompt in one pass, then `steps` passes of one token; a new KV cache each."""
    cache, dice = DynamicCache(config=model.config), torch.Generator().manual_seed(0)
    ids = torch.tensor([part.prompt])
    for step in range(part.steps):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].float()
        if part.forced is not None:
            ids = torch.tensor([[part.forced[step]]])
        elif part.temperature:
            ids = torch.multinomial((logits / part.temperature).softmax(-1), 1, generator=dice)[None]
        else:
            ids = logits.argmax()[None, None]
    model(input_ids=ids, past_key_values=cache, use_cache=True)


@torch.inference_mode()
def record_traces(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto", experts_implementation="eager").eval()
    layers = find_layers(model)
    experts, top_k = given.experts or len(layers[0].router.bias), given.top_k or layers[0].router.top_k
    if given.router != "own":
        for seed, (layer, seen) in enumerate(zip(layers, calibrate(model, tokenizer, layers), strict=True)):
            layer.router = fit_router(given.router, seen, experts, top_k, seed)
    recorder = Recorder(layers)
    recorder.attach()
    given.traces.mkdir(parents=True, exist_ok=True)
    for text, parts in texts(tokenizer).items():
        if text not in given.texts.split(","):
            continue
        recorder.passes, recorder.found = [], {}
        for part in parts:
            decode(model, part)
        foretold = {name: round(float(np.mean(recalls)), 3) for name, recalls in recorder.found.items()}
        name = f"{Path(given.model).name} {given.router} {experts}x{top_k}"
        head = {"model": name, "text": text, "layers": len(layers), "experts": experts, "top_k": top_k}
        trace = head | {"recall": foretold, "passes": recorder.passes}
        (given.traces / f"{name} {text}.json".replace(" ", "_")).write_text(json.dumps(trace))
        print(name, text, foretold, flush=True)
