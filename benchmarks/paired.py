"""What Lamina costs where everything fits: generate in turns with plain transformers, both models in one process.

    python benchmarks/paired.py .cache/bench/smollm2-135m --rounds 14

The order within a pair changes from round to round; the ratio is taken pair by pair. One JSON line last.
"""

import argparse
import json
import time
from typing import Any

import torch
from report import spread
from transformers import AutoModelForCausalLM
from turns import in_turns, ratios

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
    models = {
        "lamina": AutoModel.from_pretrained(given.model, device="cpu"),
        "plain": AutoModelForCausalLM.from_pretrained(given.model),
    }
    prompt = torch.arange(1, 17)[None]
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn, name in in_turns(list(models), given.rounds + 1):
        took = seconds(models[name], prompt, given.new_tokens)
        if turn:  # the first warms up
            taken[name].append(took)
    found = spread(pairs := ratios(taken, "lamina", "plain"))
    print(f"Lamina over plain transformers: {found['median']:.3f} ({found['min']:.3f} - {found['max']:.3f})")
    print(json.dumps({"ratio": found["median"], "least": found["min"], "greatest": found["max"], "rounds": len(pairs)}))


if __name__ == "__main__":
    main()
