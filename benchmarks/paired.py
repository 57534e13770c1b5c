"""What Lamina costs where everything fits: generate in turns with plain transformers, both models in one process.

    python benchmarks/paired.py .cache/bench/smollm2-135m --rounds 14

The order within a pair changes from round to round; the ratio is taken pair by pair. One JSON line last.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lamina import AutoModel


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--new-tokens", type=int, default=24)
    given = parser.parse_args()
    models = [AutoModelForCausalLM.from_pretrained(given.model), AutoModel.from_pretrained(given.model, device="cpu")]
    prompt = torch.arange(1, 17)[None]
    ratios = []
    for turn in range(given.rounds + 1):
        taken = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            taken[which] = seconds(models[which], prompt, given.new_tokens)
        if turn:  # the first warms up
            ratios.append(taken[1] / taken[0])
    median = statistics.median(ratios)
    print(f"Lamina over plain transformers: {median:.3f} ({min(ratios):.3f} - {max(ratios):.3f})")
    print(json.dumps({"ratio": median, "least": min(ratios), "greatest": max(ratios), "rounds": len(ratios)}))


if __name__ == "__main__":
    main()
