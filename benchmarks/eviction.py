"""Which expert to give up: eviction policies for a cache of mixture-of-experts experts, replayed on routing traces.

    python benchmarks/eviction.py record MODEL                                   # the model's own routers
    python benchmarks/eviction.py record MODEL --router clustered --experts 32 --top-k 4 --texts prose,code
    python benchmarks/eviction.py replay --jobs 2                                # every trace in .cache/bench/traces
    python benchmarks/eviction.py show                                           # the tables again, from the results

record  runs plain transformers over texts of this repository and writes which layer wanted which expert, call by
        call: a prompt of 300 tokens (chat: 55), then 400 decode steps: forced along the text (prose, code), sampled
        (chat), greedy; `mixed` is four short prompts one after the other. It also asks how well the router of a layer,
        applied to the hidden state that entered the experts one or two layers before, foretells what it will choose.
replay  counts, for each policy and cache size, how many of the experts wanted while decoding were in the cache, which
        the prompts had filled. One unit is one expert of one layer, all of one size. What is wanted and absent always
        takes a place: that of the entry of least value that this call does not still need. One line per trace goes to
        benchmarks/results/eviction.jsonl.

A dense model made into a mixture has a router that nobody trained: random directions, so that a few experts win most of
the time. `--router` puts others in its place, fitted to the hidden states of a text that is not replayed: `clustered`
chooses the nearest of E centroids, with a bias that evens out the load, as a trained router with a balancing loss does;
`whitened` random directions of the whitened state (even load, least repetition). The experts computed are then
the checkpoint's, modulo their number. None of them is a trained router. `again` says how many of a token's experts
were those of the token before: chance is k/E. Nothing here is timed.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import BENCH, RESULTS, MeasuringError, record, run_main, stamp, table
from routing import record_traces

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)

# --- Policies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The experts one layer wants in one pass, `tokens` tokens long. `wanted` counts through all layers, ascending."""

    layer: int
    tokens: int
    wanted: list[int]
    share: Floats  # of the call's tokens, per wanted expert
    next_use: Floats  # the number of the call that wants it next, per wanted expert


class Policy:
    """Worth keeping = `value`, one number per expert of all layers; `see` is told each call before it is served."""

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self.value = np.zeros(layers * experts)
        self.used = np.zeros(layers * experts)  # the number of the call that used it last
        self.clock = 0

    def see(self, call: Call) -> None:
        self.clock += 1
        self.used[call.wanted] = self.clock
        self.update(call)

    def update(self, call: Call) -> None: ...

    def worth(self, layer: int) -> Floats:
        """All values, seen from `layer`; of two equal ones the one used last is worth more."""
        return self.value + 1e-12 * self.used

    def of(self, layer: int) -> slice:
        return slice(layer * self.experts, (layer + 1) * self.experts)

    def distance(self, layer: int) -> Floats:
        """Passes until each expert's layer is computed again: 1/layers for the next layer, 1 for this one."""
        ahead = (np.arange(self.layers) - layer - 1) % self.layers + 1
        return np.repeat(ahead / self.layers, self.experts)


class Random(Policy):
    def worth(self, layer: int) -> Floats:
        return np.random.default_rng(self.clock).random(len(self.value))


class Recent(Policy):
    """LRU: the clock alone."""


class RecentTurns(Policy):
    """LRU in turns of the expert's own layer: expected next use = passes unused + distance of the layer."""

    def worth(self, layer: int) -> Floats:
        turns = np.floor((self.clock - self.used) / self.layers)
        return -(turns + self.distance(layer))


class RecentTwice(Policy):
    """LRU-2 (O'Neil et al. 1993): the last use but one."""

    def update(self, call: Call) -> None:
        self.value[call.wanted] = self.before[call.wanted]
        self.before[call.wanted] = self.clock

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self.before = np.zeros(layers * experts)


class Frequent(Policy):
    """LFU: tokens routed to it since the beginning."""

    def update(self, call: Call) -> None:
        self.value[call.wanted] += call.share * call.tokens


class Prompted(Policy):
    """The last prompt's most frequent, pinned."""

    def update(self, call: Call) -> None:
        if call.tokens > 1:
            self.value[self.of(call.layer)] = 0
            self.value[call.wanted] = call.share


class Decayed(Policy):
    """p = d^T p + (1 - d^T) share, of the layer that is computed, for a call of T tokens."""

    def __init__(self, layers: int, experts: int, d: float):
        super().__init__(layers, experts)
        self.d = d

    def update(self, call: Call) -> None:
        keep = self.d**call.tokens
        self.value[self.of(call.layer)] *= keep
        self.value[call.wanted] += (1 - keep) * call.share


class DecayedNext(Decayed):
    """Passes until the next use if each pass wants it with probability p: distance of the layer + (1 - p) / p."""

    def worth(self, layer: int) -> Floats:
        p = np.maximum(self.value, 1e-6)
        return -(self.distance(layer) + (1 - p) / p) + 1e-12 * self.used


class Blend(Policy):
    """A slow and a fast average, p = (1 - w) p_slow + w p_fast, times exp(-near * distance of the layer)."""

    def __init__(self, layers: int, experts: int, slow: float, fast: float, w: float, near: float):
        super().__init__(layers, experts)
        self.parts = [(1 - w, Decayed(layers, experts, slow)), (w, Decayed(layers, experts, fast))]
        self.near = near

    def update(self, call: Call) -> None:
        for _, part in self.parts:
            part.update(call)
        own = self.of(call.layer)
        self.value[own] = sum(weight * part.value[own] for weight, part in self.parts)

    def worth(self, layer: int) -> Floats:
        return np.log(np.maximum(self.value, 1e-9)) - self.near * self.distance(layer) + 1e-12 * self.used


class Clairvoyant(Policy):
    """Belady 1966: whose next use is furthest goes. No policy can hit more often."""

    def update(self, call: Call) -> None:
        self.value[call.wanted] = -call.next_use

    def worth(self, layer: int) -> Floats:
        return self.value


Maker = Callable[[int, int], Policy]
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995)
POLICIES: dict[str, Maker] = {
    "random": Random,
    "lru": Recent,
    "lru-turns": RecentTurns,
    "lru-2": RecentTwice,
    "lfu": Frequent,
    "prompt": Prompted,
    **{f"ema {d}": lambda n, e, d=d: Decayed(n, e, d) for d in DECAYS},
    "ema-next 0.99": lambda n, e: DecayedNext(n, e, 0.99),
    "ema-near 0.99": lambda n, e: Blend(n, e, 0.99, 0.99, 0, 0.25),
    "blend .99/.7": lambda n, e: Blend(n, e, 0.99, 0.7, 0.2, 0),
    "blend .99/.5": lambda n, e: Blend(n, e, 0.99, 0.5, 0.2, 0),
    "blend-near .98/.5": lambda n, e: Blend(n, e, 0.98, 0.5, 0.2, 0.25),
    "blend-near .99/.5": lambda n, e: Blend(n, e, 0.99, 0.5, 0.2, 0.25),
    "belady": Clairvoyant,
}
SPLIT = ("lru", "lfu", "ema 0.99", "blend .99/.5", "belady")

# --- Replay ----------------------------------------------------------------------------------------------------------


def calls_of(trace: dict[str, Any]) -> list[Call]:
    """The trace as calls, each knowing when its experts are wanted next."""
    flat = [(tokens, index, wants) for tokens, layers in trace["passes"] for index, wants in enumerate(layers)]
    soon: dict[int, int] = {}
    calls = []
    for number, (tokens, index, wants) in reversed(list(enumerate(flat))):
        experts = sorted(map(int, wants))
        wanted = [index * trace["experts"] + expert for expert in experts]
        share = np.array([wants[str(expert)] for expert in experts]) / tokens
        next_use = np.array([soon.get(expert, 10**9) + expert * 1e-6 for expert in wanted])
        soon |= dict.fromkeys(wanted, number)
        calls.append(Call(index, tokens, wanted, share, next_use))
    return calls[::-1]


class Cache:
    """`slots` experts, shared by all layers or so many each."""

    def __init__(self, policy: Policy, slots: int):
        self.policy, self.slots = policy, slots
        self.resident = np.zeros(len(policy.value), bool)

    def serve(self, call: Call) -> int:
        """Bring in what `call` wants, ascending, and return how many were there already."""
        self.policy.see(call)
        if self.resident[call.wanted].all():
            return len(call.wanted)
        worth = self.policy.worth(call.layer)
        for_sale = np.where(self.resident, worth, np.inf)
        for_sale[call.wanted] = np.inf
        held, hits = int(self.resident.sum()), 0
        for place, expert in enumerate(call.wanted):
            if self.resident[expert]:
                hits += 1
            else:
                if held == self.slots:
                    self.drop(for_sale, call.wanted[place:])
                else:
                    held += 1
                self.resident[expert] = True
            for_sale[expert] = worth[expert]
        return hits

    def drop(self, for_sale: Floats, still_wanted: list[int]) -> None:
        victim = int(for_sale.argmin())
        if not np.isfinite(for_sale[victim]):  # all that is left is still wanted: what is wanted last goes
            victim = [expert for expert in still_wanted if self.resident[expert]][-1]
        self.resident[victim] = False
        for_sale[victim] = np.inf


def one_layer(call: Call, experts: int) -> Call:
    return Call(0, call.tokens, [w - call.layer * experts for w in call.wanted], call.share, call.next_use)


def replay(trace: dict[str, Any], calls: list[Call], make: Maker, slots: int, split: bool) -> tuple[float, float]:
    """Hit rates while decoding and in prompts."""
    layers, experts = trace["layers"], trace["experts"]
    if split:
        each = [slots // layers + (layer < slots % layers) for layer in range(layers)]
        caches = [Cache(make(1, experts), size) for size in each]
    else:
        shared = Cache(make(layers, experts), slots)
    hits, wants = [0, 0], [0, 0]
    for call in calls:
        served = caches[call.layer].serve(one_layer(call, experts)) if split else shared.serve(call)
        hits[call.tokens > 1] += served
        wants[call.tokens > 1] += len(call.wanted)
    return hits[0] / max(1, wants[0]), hits[1] / max(1, wants[1])


def replay_trace(path: Path) -> dict[str, Any]:
    trace = json.loads(path.read_text())
    calls = calls_of(trace)
    units = trace["layers"] * trace["experts"]
    decoding: dict[str, list[float | None]] = {"uniform": list(SHARES)}
    prompts: dict[str, list[float]] = {}
    for name, make in POLICIES.items():
        rates = [replay(trace, calls, make, round(share * units), split=False) for share in SHARES]
        decoding[name] = [round(rate[0], 4) for rate in rates]
        prompts[name] = [round(rate[1], 4) for rate in rates]
    for name in SPLIT:  # with less than a slot per layer it cannot be split
        whole = [share * units >= trace["layers"] for share in SHARES]
        decoding[f"{name} split"] = [
            round(replay(trace, calls, POLICIES[name], round(share * units), split=True)[0], 4) if fits else None
            for share, fits in zip(SHARES, whole, strict=True)
        ]
    kept = {key: trace[key] for key in ("model", "text", "layers", "experts", "top_k", "recall")}
    return kept | {"shares": SHARES, "decode_hit_rate": decoding, "prompt_hit_rate": prompts}


def show(line: dict[str, Any]) -> None:
    rates = line["decode_hit_rate"]
    rows = [(name, *("-" if r is None else f"{100 * r:.1f}" for r in row)) for name, row in rates.items()]
    recall = ", ".join(f"{name} {value:.2f}" for name, value in line["recall"].items())
    print(f"\n{line['model']}, {line['text']}: chance {line['top_k'] / line['experts']:.2f}; {recall}")
    print(table(rows, ("decode hits, %", *(f"{share:.0%}" for share in line["shares"]))), flush=True)


def show_mean(lines: list[dict[str, Any]]) -> None:
    """The mean over all traces, as misses over the clairvoyant's: 1 is the best possible."""
    names = [name for name in lines[0]["decode_hit_rate"] if name != "uniform"]
    rows = []
    for name in names:
        cells = []
        for column in range(len(SHARES)):
            pairs = [
                (line["decode_hit_rate"][name][column], line["decode_hit_rate"]["belady"][column]) for line in lines
            ]
            ratios = [(1 - rate) / (1 - best) for rate, best in pairs if rate is not None and best < 0.999]
            cells.append(f"{np.mean(ratios):.2f}" if len(ratios) == len(pairs) else "-")
        rows.append((name, *cells))
    print(f"\nmisses over the clairvoyant's, mean of {len(lines)} traces")
    print(table(rows, ("policy", *(f"{share:.0%}" for share in SHARES))), flush=True)


def replay_traces(given: argparse.Namespace) -> None:
    paths = sorted(given.traces.glob("*.json"))
    if not paths:
        raise MeasuringError(f"no traces in {given.traces}: make some with `record MODEL` first")
    lines = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for line in pool.map(replay_trace, paths):
            show(line)
            record("eviction", line | stamp())
            lines.append(line)
    show_mean(lines)


def show_recorded(_given: argparse.Namespace) -> None:
    lines = [json.loads(line) for line in (RESULTS / "eviction.jsonl").read_text().splitlines()]
    for line in lines:
        show(line)
    show_mean(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=BENCH / "traces", help="folder of traces")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("record")
    verb.add_argument("model")
    verb.add_argument("--router", choices=("own", "clustered", "whitened"), default="own")
    verb.add_argument("--experts", type=int)
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--texts", default="prose,code,chat,greedy,mixed")
    verb.add_argument("--threads", type=int, default=2)
    verb.set_defaults(run=record_traces)
    verb = verbs.add_parser("replay")
    verb.add_argument("--jobs", type=int, default=2)
    verb.set_defaults(run=replay_traces)
    verb = verbs.add_parser("show")
    verb.set_defaults(run=show_recorded)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    run_main(main)
