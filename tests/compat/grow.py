"""grow.py FOLDER MORE: let a cache grow in a process of its own, with MORE bytes beyond the least that is stated.

Prints one JSON line: tokens that went in, what was said when no more would, the peak of the process, the budget.
"""

from __future__ import annotations

import json
import sys

import torch

from lamina import AutoModel, BudgetError
from lamina.hf.internals import cache_of

CHUNK, MOST = 128, 2048  # tokens


def main(folder: str, more: int) -> None:
    torch.set_num_threads(1)
    try:
        AutoModel.from_pretrained(folder, memory=1, device="cpu", context=CHUNK, draft=None)
    except BudgetError as error:
        budget = error.minimum_bytes + more
    model = AutoModel.from_pretrained(folder, memory=budget, device="cpu", context=CHUNK, draft=None)
    ids = torch.randint(4, 120, (1, CHUNK), generator=torch.Generator().manual_seed(0))
    given, tokens, refused = {}, 0, ""
    with model.lamina, torch.no_grad():
        try:
            while tokens < MOST:
                out = model(input_ids=ids, use_cache=True, **given)
                name = next(name for name in out if out[name] is cache_of(out))
                given = {name: out[name]}
                tokens += CHUNK
                del out
        except BudgetError as error:
            refused = str(error)
        peak = model.lamina.stats.peak_rss_bytes
    print(json.dumps({"tokens": tokens, "refused": refused, "peak": peak, "budget": budget}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
