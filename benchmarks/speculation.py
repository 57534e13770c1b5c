"""What a draft is worth: the same prompts with and without one, at the same budget, in turns.

    python benchmarks/speculation.py speed .cache/bench/qwen-1.5b --drafts none self lookup --memory 2.5GB
    python benchmarks/speculation.py slowdown .cache/bench/qwen-1.5b --memory 2.5GB
    python benchmarks/speculation.py equal .cache/bench/qwen-1.5b --dtype float32 --drafts self lookup
    python benchmarks/speculation.py tree .cache/bench/qwen-1.5b --drafts self .cache/bench/qwen-0.5b

`speed` runs `lamina run --chat --json` once for each draft and prompt, a round after another; a draft that needs memory
leaves less for the weights, so each has a process and a plan of its own. `slowdown` asks what a lookup costs where it
finds nothing: one process, one plan, answers with and without it in turns. `equal` generates greedily with and without
each draft, all in memory, and counts the answers that differ, and where. `tree` replays the answers that `speed`
recorded: how many tokens a pass chains of 8, 16 and 31 tokens give, and how many if each token had its second choice
beside it, as the leaf of a tree. What is measured goes to results/speculation.jsonl.
"""

import argparse
import json
import subprocess
import time
from itertools import product
from pathlib import Path
from typing import Any

from report import RESULTS, MeasuringError, record, run_main, spread, stamp, table, versions
from turns import order

NAME = "speculation"
FUNCTION = '''def moving_average(values, window):
    """Mean of each run of `window` values."""
    if window < 1:
        raise ValueError("window must be at least 1")
    total = 0.0
    means = []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        if index >= window - 1:
            means.append(total / window)
    return means
'''
PROMPTS = {
    "code 1": "Write a Python function that parses a CSV line with quotes.",
    "code 2": "Write a Python class for a binary search tree with insert, delete, find and in-order traversal, with "
    "docstrings and type hints.",
    "prose 1": "Describe how the sea looks on an autumn evening, in five long paragraphs.",
    "prose 2": "Tell the story of a lighthouse keeper who finds a letter in a bottle.",
    "edit 1": f"Repeat this function with one change: rename `means` to `averages`.\n\n{FUNCTION}",
    "edit 2": "Repeat this function with one change: add a parameter `start=0` from which on values count."
    f"\n\n{FUNCTION}",
}
TASKS = (
    "Write a Python function that {}.",
    "Explain in one paragraph how one {}.",
    "Write a short bash script that {}.",
    "Give three pitfalls when a program {}.",
    "Tell a very short story of somebody who {}.",
)
THINGS = (
    "reverses a linked list",
    "counts the words of a file",
    "sorts a list of names by length",
    "finds the longest common prefix of two strings",
    "converts temperatures between two units",
    "checks whether brackets are balanced",
    "merges two sorted lists",
    "downloads a page and saves it",
    "removes duplicates and keeps the order",
    "computes the days between two dates",
)


def speed(given: argparse.Namespace) -> None:
    """Rounds over prompts and drafts, each a process."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn, prompt in product(range(given.rounds), given.prompts):
        for draft in order(given.drafts, turn):
            stats = _run(given, draft, PROMPTS[prompt])
            seen.setdefault((prompt, draft), []).append(stats)
            print(f"{prompt:8} {_short(draft):12} {_line(stats)}", flush=True)
            record(NAME, {**stamp(), "packages": versions(), "part": "speed", "prompt": prompt,
                          "draft": _short(draft), "memory": given.memory, "result": stats})  # fmt: skip
    rows = []
    for (prompt, draft), runs in seen.items():
        plain = seen.get((prompt, "none"))
        each = [run["seconds_per_token"] for run in runs]
        ratio = "-"
        if plain and draft != "none":
            ratios = [a["seconds_per_token"] / b for a, b in zip(plain, each, strict=True)]
            ratio = f"{spread(ratios)['median']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        passes = spread([run["tokens_per_pass"] for run in runs])["median"]
        right = sum(run["accepted_tokens"] for run in runs) / max(sum(run["drafted_tokens"] for run in runs), 1)
        rows.append((prompt, _short(draft), f"{spread(each)['median']:.4f}", ratio, f"{passes:.1f}", f"{right:.0%}"))
    print(table(rows, ("prompt", "draft", "s/token", "times none", "tokens/pass", "right")))


def _run(given: argparse.Namespace, draft: str, prompt: str) -> dict[str, Any]:
    tokens = given.plain_tokens if draft == "none" and given.plain_tokens else given.new_tokens
    command = ["lamina", "run", given.model, prompt, "--chat", "--draft", draft, "--memory", given.memory,
               "--context", str(given.context), "--max-new-tokens", str(tokens), "--json", "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MeasuringError(f"{' '.join(command[:3])} --draft {draft}: {done.stderr.strip()[-300:]}")
    answer = json.loads(done.stdout)
    kept = ("passes", "new_tokens", "tokens_per_pass", "seconds_per_token", "drafted_tokens", "accepted_tokens",
            "draft_share_of_time", "accepted_by_position", "draft_bytes", "peak_rss_bytes", "bytes_read_per_pass",
            "resident_bytes", "time_to_first_token_seconds")  # fmt: skip
    return {**{key: answer["stats"][key] for key in kept}, "tokens": answer["tokens"]}


def _line(stats: dict[str, Any]) -> str:
    return (
        f"{stats['seconds_per_token']:.4f} s/token  {stats['tokens_per_pass']:.2f} tokens/pass  "
        f"{stats['accepted_tokens']} of {stats['drafted_tokens']} right  {stats['draft_share_of_time']:.0%} drafting  "
        f"peak {stats['peak_rss_bytes'] / 1e9:.2f} GB"
    )


def _short(draft: str) -> str:
    return Path(draft).name


def slowdown(given: argparse.Namespace) -> None:
    """Answers with and without a lookup in turns, in one process: the ratio of their times."""
    from lamina import AutoModel

    model = AutoModel.from_pretrained(given.model, memory=given.memory, context=given.context, draft="lookup")
    ratios: dict[str, list[float]] = {}
    for turn, prompt in product(range(given.rounds), given.prompts):
        taken = {}
        for draft in order(("none", "lookup"), turn):
            began = time.perf_counter()
            out = _generate(model, PROMPTS[prompt], given.new_tokens, draft, exact=given.exact)
            taken[draft] = (time.perf_counter() - began) / len(out)
        ratios.setdefault(prompt, []).append(taken["lookup"] / taken["none"])
        print(f"{prompt:8} lookup over none {ratios[prompt][-1]:.3f}", flush=True)
    record(NAME, {**stamp(), "packages": versions(), "part": "slowdown", "memory": given.memory, "exact": given.exact,
                  "result": {prompt: spread(each) for prompt, each in ratios.items()}})  # fmt: skip
    rows = [(prompt, f"{spread(each)['median']:.3f}", f"{min(each):.3f} - {max(each):.3f}")
            for prompt, each in ratios.items()]  # fmt: skip
    print(table(rows, ("prompt", "time, lookup over none", "range")))


def equal(given: argparse.Namespace) -> None:
    """Greedy answers with each draft against those of none, all in memory."""
    import torch

    from lamina import AutoModel

    own = [draft for draft in given.drafts if draft not in ("none", "lookup")]
    model = AutoModel.from_pretrained(
        given.model, dtype=getattr(torch, given.dtype), context=given.context, draft=own[0] if own else "lookup"
    )
    prompts = [task.format(thing) for task in TASKS for thing in THINGS][: given.count]
    ways = [
        (draft, exact)
        for draft in given.drafts
        if draft != "none"
        for exact in ((False, True) if given.exact else (False,))
    ]
    differing: dict[tuple[str, bool], list[int]] = {way: [] for way in ways}
    tokens = 0
    for number, prompt in enumerate(prompts, 1):
        plain = _generate(model, prompt, given.new_tokens, "none")
        tokens += len(plain)
        for draft, exact in ways:
            drafted = _generate(model, prompt, given.new_tokens, draft, exact=exact)
            if drafted != plain:
                differing[draft, exact].append(
                    next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b)
                )
        counts = [f"{_short(d)}{' exact' if exact else ''} {len(each)}" for (d, exact), each in differing.items()]
        print(f"{number} of {len(prompts)}, differing: {', '.join(counts)}", flush=True)
    for (draft, exact), each in differing.items():
        record(NAME, {**stamp(), "packages": versions(), "part": "equal", "draft": _short(draft), "exact": exact,
                      "dtype": given.dtype, "result": {"prompts": len(prompts), "tokens": tokens,
                                                       "differ": len(each), "first_at": each}})  # fmt: skip


def tree(given: argparse.Namespace) -> None:
    """Chains against chains with a second choice at each place, on recorded answers; the draft sees the true text."""
    import torch

    from lamina import AutoModel

    lines = [json.loads(line) for line in (RESULTS / f"{NAME}.jsonl").read_text().splitlines()]
    answers = {line["prompt"]: line["result"]["tokens"] for line in lines
               if line["part"] == "speed" and line["draft"] == "self"}  # fmt: skip
    model = AutoModel.from_pretrained(given.model, context=given.context, draft=None)
    rows = []
    for name in given.drafts:
        _generate(model, "Hello", 2, name)  # loads the draft
        draft = model.lamina.decoder._drafts[name][0].model
        for prompt, answer in answers.items():
            ids = _ids(model, PROMPTS[prompt])["input_ids"]
            text = torch.cat([ids, torch.tensor([answer])], -1)
            with torch.no_grad():
                best = draft(input_ids=text).logits[0, ids.shape[1] - 1 : -1].topk(2).indices
            first, second = (best == torch.tensor(answer)[:, None]).unbind(-1)
            row = [prompt, _short(name), f"{first.float().mean():.3f}", f"{second[~first].float().mean():.2f}"]
            for length in (8, 16, 31):
                chain, leaves = (_tokens_a_pass(first.tolist(), second.tolist(), length, way) for way in (False, True))
                row.append(f"{chain:.1f} {leaves:.1f}")
            rows.append(row)
    print(table(rows, ("prompt", "draft", "first right", "else second", "8: chain, leaves", "16", "31")))


def _tokens_a_pass(first: list[bool], second: list[bool], length: int, leaves: bool) -> float:
    at = passes = 0
    while at < len(first):
        passes += 1
        wrong = next((i for i in range(at, min(at + length, len(first))) if not first[i]), None)
        if wrong is None:
            at += length + 1
        else:  # the target's own token is there, and behind a leaf that was right the one after it
            at = wrong + 1 + (leaves and second[wrong])
    return len(first) / passes


def _ids(model: Any, prompt: str) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def _generate(model: Any, prompt: str, new_tokens: int, draft: str, exact: bool = False) -> list[int]:
    inputs = _ids(model, prompt)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, draft=draft, exact=exact)
    return [int(token) for token in out[0, inputs["input_ids"].shape[1] :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "slowdown", "equal", "tree"))
    parser.add_argument("model")
    parser.add_argument("--drafts", nargs="+", default=["none", "self"])
    parser.add_argument("--memory", default="2.5GB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--plain-tokens", type=int, default=0, help="without a draft, where fewer tell as much")
    parser.add_argument("--prompts", nargs="+", choices=tuple(PROMPTS), default=tuple(PROMPTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of equal")
    parser.add_argument("--count", type=int, default=50, help="prompts of equal")
    parser.add_argument("--exact", action="store_true")
    given = parser.parse_args()
    {"speed": speed, "slowdown": slowdown, "equal": equal, "tree": tree}[given.part](given)


if __name__ == "__main__":
    run_main(main)
