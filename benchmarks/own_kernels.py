"""Lamina's own products beside torch's: one row, a verified draft, and a pass of several rows, in turns.

    python benchmarks/own_kernels.py MODEL --rows 16 --rounds 6

MODEL is all in memory. Times are of the processor, not of the clock, and of one thread unless said otherwise, so that
other work on the machine shows less. One JSON line last.
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from typing import Any

import torch
from report import run_main, spread
from transformers import DynamicCache
from turns import in_turns

from lamina import AutoModel
from lamina.hf.decoding.exact_rows import one_row

CONTEXT = 200  # tokens before


def seconds(model: Any, cache: Any, rows: int, exact: bool) -> float:
    """Of the processor, for a pass over `rows` new tokens."""
    ids, before = torch.arange(50, 50 + rows)[None], copy.deepcopy(cache)
    began = time.process_time()
    with torch.no_grad(), one_row(rows if exact else 1, torch.device("cpu")):
        model(ids, past_key_values=before)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModel.from_pretrained(given.model, device="cpu", draft=None)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(torch.arange(5, 5 + CONTEXT)[None], past_key_values=cache, logits_to_keep=1)
    cases = [
        (name, rows, exact)
        for name in ("torch", "lamina")
        for rows, exact in ((1, False), (given.rows, True), (given.rows, False))
    ]
    taken: dict[tuple[str, int, bool], list[float]] = defaultdict(list)
    for turn, case in in_turns(cases, given.rounds + 1):
        name, rows, exact = case
        model.lamina.own_kernels = name == "lamina"
        took = seconds(model, cache, rows, exact)
        if turn:  # the first warms up
            taken[case].append(took)
    found = {
        f"{name}, {rows} rows{', exact' if exact else ''}": spread(took) for (name, rows, exact), took in taken.items()
    }
    for what, each in found.items():
        print(f"{what:26} {each['median']:.3f} s ({each['min']:.3f} - {each['max']:.3f})")
    print(json.dumps({"model": given.model, "threads": given.threads, "seconds": found}))


if __name__ == "__main__":
    run_main(main)
