"""Schedules and files without a model: what the tests of `plan` and `stream` run on.

A `Checkpoint` gives weights their bytes on a disk that lives in memory (or nowhere, for a 405B), `llama` and
`mixture` build passes in the shape of real models, `random_schedule` builds what no real model would dare.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time

from lamina.checkpoint.extent import Extent
from lamina.errors import TruncatedError
from lamina.plan.forecast import Hardware
from lamina.plan.layout import Part, cut_up, widest_window
from lamina.plan.plan import Budget, Plan
from lamina.plan.schedule import Call, Convert, Cut, Piece, Schedule, Weight

POISON = 0xA5


class Checkpoint:
    """Files with seeded bytes; weights are allotted one after another, with gaps."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.sizes: dict[str, int] = {}
        self.weights: dict[str, Weight] = {}
        self._bytes: dict[str, bytes] = {}

    def extent(self, length: int, file: str = "a", gap: int = 0, to: int = 1) -> Extent:
        begin = -(-(self.sizes.get(file, 0) + gap) // to) * to
        self.sizes[file] = begin + length
        return Extent(file, begin, length)

    def add(self, name: str, *shape: int, file: str = "a", gap: int = 0, itemsize: int = 2, stored: int = 0,
            pieces: int = 1, cut: Cut = Cut.WHOLE, gathered: bool = False, always: bool = False,
            odd: bool = False, experts: int = 0) -> str:  # fmt: skip
        """A weight of `shape`, `stored` bytes per element on disk, in `pieces` runs that lie shuffled.

        One that is cut by experts holds `experts` of them, or as many as it has rows.
        """
        stored = stored or itemsize
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements * stored
        cuts = sorted(self.random.sample(range(0, elements), min(pieces, elements) - 1)) if elements else []
        marks = [0, *(c * stored for c in cuts), nbytes]
        runs = [(a, b) for a, b in itertools.pairwise(marks) if a < b] or [(0, 0)]
        order = list(runs)
        self.random.shuffle(order)
        at = {run: self.extent(run[1] - run[0], file, gap, 1 if odd else stored) for run in order}
        self.weights[name] = Weight(
            name, tuple(shape), "bfloat16" if itemsize == 2 else "float32", itemsize,
            tuple(Piece(at[run], run[0]) for run in runs), stored, nbytes,
            convert=Convert.NONE if stored == itemsize else Convert.CAST,
            cut=cut, gathered=gathered, always=always,
            experts=(experts or shape[0]) if cut is Cut.EXPERTS else 0,
        )  # fmt: skip
        return name

    def content(self, file: str) -> bytes:
        if file not in self._bytes or len(self._bytes[file]) < self.sizes[file]:
            self._bytes[file] = random.Random(f"bytes of {file}").randbytes(self.sizes[file])
        return self._bytes[file]

    def stored(self, part: Part) -> bytes:
        """What the bytes of a part must be, found the slow way."""
        weight = self.weights[part.weight]
        whole = bytearray(weight.stored_nbytes)
        for piece in weight.pieces:
            extent = piece.extent
            whole[piece.at : piece.at + extent.length] = self.content(extent.file)[extent.offset :][: extent.length]
        row = weight.stored_nbytes // weight.rows if weight.rows else 0
        return bytes(whole[part.first * row : (part.first + part.count) * row])


class Disk:
    """The file system of a checkpoint. Reads take a random time and poison their target first."""

    def __init__(self, checkpoint: Checkpoint, seed: int = 0, slow: float = 0.0, direct: bool = True) -> None:
        self.checkpoint, self.slow, self.direct = checkpoint, slow, direct
        self.random = random.Random(seed)
        self.cut_at: int | None = None  # files end here
        self.broken: BaseException | None = None
        self.gate = threading.Event()  # reads wait for it
        self.gate.set()
        self.opened: list[File] = []
        self.reads = 0

    def open(self, path: str) -> File:
        self.opened.append(File(self, path))
        return self.opened[-1]


class File:
    """One open file of a `Disk`."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.disk, self.path, self.direct, self.closed = disk, path, disk.direct, False

    def read_into(self, target: memoryview, offset: int, needed: int) -> None:
        disk = self.disk
        target[:] = bytes([POISON]) * len(target)
        disk.gate.wait(30)
        if disk.slow and disk.random.random() < 0.5:
            time.sleep(disk.random.random() * disk.slow)
        assert not self.closed, "read after close"
        disk.reads += 1
        if disk.broken is not None:
            raise disk.broken
        content = disk.checkpoint.content(self.path)[: disk.cut_at]
        got = content[offset : offset + len(target)]
        target[: len(got)] = got
        if len(got) < needed:
            raise TruncatedError(f"{self.path} ends at byte {len(content)}, wanted {offset + needed}")

    def close(self) -> None:
        self.closed = True


def llama(layers: int, hidden: int, intermediate: int, kv: int, vocab: int, *, tied: bool = False,
          itemsize: int = 2, stored: int = 0, shard: int = 0) -> tuple[Schedule, Checkpoint]:  # fmt: skip
    """The pass of a Llama: norms always resident, linears cut by rows, the embedding gathered."""
    disk = Checkpoint()
    file = "a"

    def linear(name: str, rows: int, columns: int) -> Call:
        weight = disk.add(f"{name}.weight", rows, columns, file=file, itemsize=itemsize, stored=stored, cut=Cut.ROWS)
        return Call(name, (weight,))

    def norm(name: str) -> Call:
        weight = disk.add(f"{name}.weight", hidden, file=file, itemsize=itemsize, stored=stored, always=True)
        return Call(name, (weight,))

    embed = Call("model.embed_tokens", (disk.add("model.embed_tokens.weight", vocab, hidden, itemsize=itemsize,
                 stored=stored, cut=Cut.ROWS if tied else Cut.WHOLE, gathered=not tied),))  # fmt: skip
    blocks = []
    for i in range(layers):
        file = f"shard-{i // shard}" if shard else "a"
        at = f"model.layers.{i}"
        attention = Call(f"{at}.self_attn", (), (
            linear(f"{at}.self_attn.q_proj", hidden, hidden), linear(f"{at}.self_attn.k_proj", kv, hidden),
            linear(f"{at}.self_attn.v_proj", kv, hidden), linear(f"{at}.self_attn.o_proj", hidden, hidden),
        ))  # fmt: skip
        mlp = Call(f"{at}.mlp", (), (
            linear(f"{at}.mlp.gate_proj", intermediate, hidden), linear(f"{at}.mlp.up_proj", intermediate, hidden),
            linear(f"{at}.mlp.down_proj", hidden, intermediate),
        ))  # fmt: skip
        norms = norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm")
        blocks.append(Call(at, (), (norms[0], attention, norms[1], mlp)))
    file = "a"
    inner = Call("model", (), (embed, *blocks, norm("model.norm")))
    head = Call("lm_head", ("model.embed_tokens.weight",)) if tied else linear("lm_head", vocab, hidden)
    return Schedule(Call("", (), (inner, head)), disk.weights, frozenset(block.module for block in blocks)), disk


def mixture(layers: int, hidden: int, intermediate: int, experts: int, vocab: int = 512, *,
            routed: int = 2) -> tuple[Schedule, Checkpoint]:  # fmt: skip
    """The pass of a Mixtral: every expert a slice of two 3-D weights; a token goes to `routed` of a layer's."""
    disk = Checkpoint()
    blocks = []
    of_a_token = {}
    for i in range(layers):
        at = f"model.layers.{i}"
        names = [f"{at}.self_attn.{kind}_proj" for kind in "qkvo"]
        attention = [Call(name, (disk.add(f"{name}.weight", hidden, hidden, cut=Cut.ROWS),)) for name in names]
        router = Call(f"{at}.mlp.gate", (disk.add(f"{at}.mlp.gate.weight", experts, hidden, always=True),))
        sizes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
        up, down = (disk.add(f"{at}.mlp.experts.{name}", experts, *size, cut=Cut.EXPERTS)
                    for name, size in sizes.items())  # fmt: skip
        of_a_token[f"{at}.mlp.experts"] = routed
        mlp = Call(f"{at}.mlp", (), (router, Call(f"{at}.mlp.experts", (up, down))))
        blocks.append(Call(at, (), (Call(f"{at}.self_attn", (), tuple(attention)), mlp)))
    embed = Call("model.embed_tokens", (disk.add("model.embed_tokens.weight", vocab, hidden, gathered=True),))
    head = Call("lm_head", (disk.add("lm_head.weight", vocab, hidden, cut=Cut.ROWS),))
    root = Call("", (), (Call("model", (), (embed, *blocks)), head))
    return Schedule(root, disk.weights, frozenset(block.module for block in blocks), routed=of_a_token), disk


def random_schedule(seed: int, scale: int = 4096, *, share: float = 0.15) -> tuple[Schedule, Checkpoint]:
    """A tree of calls with everything that is allowed: weights of the parents' own, shared modules, merged and cast
    weights, gaps, several files, blocks, weights that nobody touches."""
    rng = random.Random(seed)
    disk = Checkpoint(seed)
    count = 0

    def weight() -> str:
        nonlocal count
        count += 1
        kind = rng.choice(("linear", "linear", "linear", "norm", "merged", "cast", "experts", "table"))
        columns = rng.choice((1, 3, 8, 16))
        rows = max(int(rng.choice((0.1, 0.5, 1, 1, 2, 4)) * scale) // (2 * columns), 1)
        common = {"file": rng.choice("aab"), "gap": rng.choice((0, 0, 0, 6, 5000, 70_000))}
        if kind == "linear":
            return disk.add(f"w{count}", rows, columns, cut=Cut.ROWS, odd=rng.random() < 0.1, **common)
        if kind == "merged":
            return disk.add(f"w{count}", rows, columns, cut=Cut.ROWS, pieces=rng.randint(2, 5), **common)
        if kind == "cast":
            return disk.add(f"w{count}", rows, columns, itemsize=2, stored=4, cut=Cut.ROWS, **common)
        if kind == "experts":
            held, size = rng.randint(2, 5), max(rows // 8, 1)
            shape = rng.choice(((held, size, columns), (held * size, columns)))
            pieces = rng.choice((1, 1, 3))
            return disk.add(f"w{count}", *shape, cut=Cut.EXPERTS, experts=held, pieces=pieces, **common)
        if kind == "table":
            return disk.add(f"w{count}", rows, columns, gathered=True, **common)
        return disk.add(f"w{count}", rng.randint(1, 40), always=rng.random() < 0.5, **common)

    modules = 0
    shared: list[Call] = []

    def call(depth: int, prefix: str) -> Call:
        nonlocal modules
        if shared and rng.random() < share:
            return rng.choice(shared)
        modules += 1
        name = f"{prefix}.m{modules}"
        own = tuple(weight() for _ in range(rng.choice((0, 1, 1, 2)) if depth else rng.choice((1, 1, 2))))
        inner = tuple(call(depth - 1, name) for _ in range(rng.randint(1, 3))) if depth else ()
        made = Call(name, own, inner)
        if rng.random() < 0.3:
            shared.append(made)
        return made

    layers = [call(rng.randint(0, 3), f"layer{i}") for i in range(rng.randint(2, 6))]
    root = Call("", (), tuple(layers))
    disk.add("untouched", 7, always=True)
    routed = {call.module: rng.randint(0, 4) for call in root.walk() if rng.random() < 0.7}
    return Schedule(root, disk.weights, frozenset(layer.module for layer in layers), routed=routed), disk


def narrow(schedule: Schedule, plan: Plan, more: int = 0) -> Plan:
    """The same plan with the smallest ring that can make a pass, and `more`."""
    held = widest_window(schedule.root, plan.items, plan.steps)
    ring = held + max(item.nbytes for item in plan.items) + more
    return dataclasses.replace(plan, ring_bytes=ring, device_ring_bytes=ring)


def streamed(schedule: Schedule, size: int, more: int = 0) -> Plan:
    """A plan that streams everything, in units of `size` bytes."""
    items, steps = cut_up(schedule, {n: w for n, w in schedule.weights.items() if not w.gathered}, size)
    plan = Plan(Budget(0), Hardware(), 0, 0, frozenset(), frozenset(), items, steps, 0, 0, 0)
    return narrow(schedule, plan, more)


def nested(inner: int = 12) -> tuple[Schedule, Checkpoint]:
    """One layer that holds a weight of its own while many calls inside it come and go."""
    checkpoint = Checkpoint()
    calls = tuple(Call(f"layer.{i}", (checkpoint.add(f"w{i}", 256, 16, cut=Cut.ROWS),)) for i in range(inner))
    layer = Call("layer", (checkpoint.add("own", 700, cut=Cut.WHOLE),), calls)
    after = Call("after", (checkpoint.add("after", 700),))
    return Schedule(Call("", (), (layer, after)), checkpoint.weights, frozenset({"layer"})), checkpoint


def towered(layers: int = 3, blocks: int = 4, hidden: int = 64, width: int = 48, *,
            main: tuple[Schedule, Checkpoint] | None = None) -> tuple[Schedule, Checkpoint]:  # fmt: skip
    """A Llama, or the pass that is given, with a tower that it does not go through: `blocks` of two linears each.

    The bytes of the tower are in a file of their own, "tower".
    """
    schedule, disk = main or llama(layers, hidden, 2 * hidden, hidden, 4 * hidden)
    inner = []
    for i in range(blocks):
        names = f"tower.{i}.up", f"tower.{i}.down"
        up, down = (Call(n, (disk.add(f"{n}.weight", 2 * width, width, file="tower", cut=Cut.ROWS),)) for n in names)
        inner.append(Call(f"tower.{i}", (), (up, down)))
    tower = Call("tower", (), tuple(inner))
    return dataclasses.replace(schedule, weights=disk.weights, branches=(*schedule.branches, tower)), disk
