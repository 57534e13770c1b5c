"""The passes of models too large to have here, built from the numbers of their configs: no file, no transformers.

A `Model` has the sizes that a config states; `schedule` gives the pass that tracing such a model gives, with the
weights as they are (bf16) or as `lamina split` would store them, so that the planner can plan it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lamina.checkpoint.extent import Extent
from lamina.codec import AFFINE, LOSSLESS
from lamina.plan.plan import Budget
from lamina.plan.schedule import Call, Convert, Cut, Piece, Schedule, Segment, Weight
from lamina.store.preview import LOSSLESS_SHARE
from lamina.weights.describe import scratch_bytes

FORMS = {"bf16": "", "lossless": LOSSLESS.name, "8bit": "q8", "4bit": "q4"}
PANEL_ROWS = 128  # of a lossless panel
CONTEXT = 1024  # tokens of prompt and answer
OVERHEAD = 512 * 10**6
WORKSPACE = 2.75  # as in lamina.hf.trace
LAYER_OPERATIONS = {"gqa": 61, "mla": 110}  # of torch in a layer, as the trace counts them for Llama and DeepSeek-V3
ROUTER_OPERATIONS = 25


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: ranks, and the parts of a head."""

    queries: int = 1536
    keys: int = 512
    nope: int = 128
    rope: int = 64
    values: int = 128


@dataclass(frozen=True)
class Model:
    """The sizes of a model.

    Attributes:
        ffn: of a dense layer; `expert_ffn` of an expert.
        head: of a head, where attention is grouped.
        experts: of a layer; a token goes to `routed` of them, and always to the `shared` ones.
        dense: leading layers without experts.
        latent: where attention is latent.
        source: where the numbers are from.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    experts: int = 0
    routed: int = 0
    shared: int = 0
    expert_ffn: int = 0
    dense: int = 0
    latent: Latent | None = None
    source: str = "its config.json"


MODELS = (
    Model("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Model("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064),
    Model("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    Model("Qwen3-30B-A3B", 48, 2048, 6144, 32, 4, 128, 151936, 128, 8, 0, 768),
    Model("gpt-oss-120b", 36, 2880, 2880, 64, 8, 64, 201088, 128, 4, 0, 2880),
    Model("Qwen3-235B-A22B", 94, 4096, 12288, 64, 4, 128, 151936, 128, 8, 0, 1536),
    Model("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128, 128256),
    Model("DeepSeek-V3 671B", 61, 7168, 18432, 128, 128, 192, 129280, 256, 8, 1, 2048, 3, Latent()),
    Model("Kimi-K2 1T", 61, 7168, 18432, 64, 64, 192, 163840, 384, 8, 1, 2048, 1, Latent()),
    Model("2.8T, assumed shape", 72, 8192, 20480, 64, 64, 192, 163840, 512, 8, 1, 3072, 1, Latent(), "assumed"),
)


class _Disk:
    """Weights one after another in one file that does not exist."""

    def __init__(self, codec: str) -> None:
        self.codec, self.at = codec, 0
        self.weights: dict[str, Weight] = {}

    def add(self, name: str, *shape: int, cut: Cut = Cut.WHOLE, gathered: bool = False, plain: bool = False) -> str:
        elements = 1
        for size in shape:
            elements *= size
        codec = "" if plain else self.codec
        rows, panel_rows, panel_bytes = elements // shape[-1], 1, 2 * shape[-1]
        if codec == LOSSLESS.name:
            panel_rows = min(PANEL_ROWS, rows)
            panel_bytes = round(LOSSLESS_SHARE * 2 * panel_rows * shape[-1])
        elif codec:
            panel_bytes = AFFINE[codec].panel_bytes(shape[-1])
        stored = -(-rows // panel_rows) * panel_bytes
        segments = (Segment(0, rows, codec, panel_rows, panel_bytes, 0),) if codec else ()
        self.weights[name] = Weight(
            name, shape, "bfloat16", 2, (Piece(Extent("model.safetensors", self.at, stored), 0),), 1 if codec else 2,
            stored, Convert.UNPACK if codec else Convert.NONE, cut, gathered, always=plain,
            experts=shape[0] if cut is Cut.EXPERTS else 0, segments=segments,
        )  # fmt: skip
        self.at += stored
        return name

    def linear(self, name: str, rows: int, columns: int) -> Call:
        return Call(name, (self.add(f"{name}.weight", rows, columns, cut=Cut.ROWS),))

    def small(self, name: str, *shape: int) -> Call:
        return Call(name, (self.add(f"{name}.weight", *shape, plain=True),))


def schedule(model: Model, form: str) -> Schedule:
    """The pass of a model in one of `FORMS`."""
    disk = _Disk(FORMS[form])
    embed = Call("embed", (disk.add("embed.weight", model.vocab, model.hidden, gathered=True),))
    layers = tuple(_layer(disk, model, number) for number in range(model.layers))
    head = Call("lm_head", (disk.add("lm_head.weight", model.vocab, model.hidden, cut=Cut.ROWS),))
    routing = range(model.dense, model.layers if model.experts else 0)
    operations = model.layers * LAYER_OPERATIONS["mla" if model.latent else "gqa"] + len(routing) * ROUTER_OPERATIONS
    return Schedule(
        Call("", (), (embed, *layers, disk.small("norm", model.hidden), head)),
        disk.weights,
        frozenset(layer.module for layer in layers),
        routed={f"layers.{number}.experts": model.routed for number in routing},
        scratch_bytes=scratch_bytes(disk.weights.values()),
        operations=operations,
    )


def _layer(disk: _Disk, model: Model, number: int) -> Call:
    at, hidden = f"layers.{number}", model.hidden
    attention = Call(f"{at}.attention", (), tuple(_attention(disk, model, f"{at}.attention")))
    parts = [disk.small(f"{at}.norm", hidden), attention, disk.small(f"{at}.post_norm", hidden)]
    if not model.experts or number < model.dense:
        parts.append(_gated(disk, f"{at}.mlp", hidden, model.ffn))
        return Call(at, (), tuple(parts))
    parts.append(disk.small(f"{at}.router", model.experts, hidden))
    gate_up = disk.add(f"{at}.experts.gate_up", model.experts, 2 * model.expert_ffn, hidden, cut=Cut.EXPERTS)
    down = disk.add(f"{at}.experts.down", model.experts, hidden, model.expert_ffn, cut=Cut.EXPERTS)
    parts.append(Call(f"{at}.experts", (gate_up, down)))
    if model.shared:
        parts.append(_gated(disk, f"{at}.shared", hidden, model.shared * model.expert_ffn))
    return Call(at, (), tuple(parts))


def _attention(disk: _Disk, model: Model, at: str) -> Iterator[Call]:
    hidden, heads = model.hidden, model.heads
    if model.latent is None:
        yield disk.linear(f"{at}.q", heads * model.head, hidden)
        yield disk.linear(f"{at}.k", model.kv_heads * model.head, hidden)
        yield disk.linear(f"{at}.v", model.kv_heads * model.head, hidden)
        yield disk.linear(f"{at}.o", hidden, heads * model.head)
        return
    own = model.latent
    yield disk.linear(f"{at}.q_a", own.queries, hidden)
    yield disk.linear(f"{at}.q_b", heads * (own.nope + own.rope), own.queries)
    yield disk.linear(f"{at}.kv_a", own.keys + own.rope, hidden)
    yield disk.linear(f"{at}.kv_b", heads * (own.nope + own.values), own.keys)
    yield disk.linear(f"{at}.o", hidden, heads * own.values)


def _gated(disk: _Disk, at: str, hidden: int, ffn: int) -> Call:
    calls = [disk.linear(f"{at}.gate", ffn, hidden), disk.linear(f"{at}.up", ffn, hidden)]
    return Call(at, (), (*calls, disk.linear(f"{at}.down", hidden, ffn)))


def budget(model: Model, scratch: int, memory: int, device_memory: int | None = None) -> Budget:
    """What a user's process has, with room for `CONTEXT` tokens; transformers caches a latent head's keys whole."""
    values = model.latent.values if model.latent else model.head
    cache = 2 * CONTEXT * model.layers * model.kv_heads * (model.head + values)
    widest = max(model.ffn if model.dense or not model.experts else 0, model.expert_ffn * max(model.routed, 1))
    alive = 2 * CONTEXT * (6 * model.hidden + 2 * model.heads * model.head + 3 * widest)
    return Budget(memory, OVERHEAD, int(WORKSPACE * alive), cache, CONTEXT, device_memory, scratch)
