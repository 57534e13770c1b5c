"""Whether a continuous batch keeps the memory promise: many requests of all lengths, in a cgroup equal to the budget.

    python benchmarks/batch_memory.py MODEL --memory 650MB                   # 200 requests of 10 to 2,000 tokens
    python benchmarks/batch_memory.py MODEL --memory 650MB --ways manager --tokenizer

generate_batch   all requests at once through `model.generate_batch`
manager          one after another, as they reach a server, through `model.init_continuous_batching`

Each way is a process of its own under a cap of `--memory`, which counts page cache; making it needs root. A way passes
if every request came to its end and the peak resident memory of the process is at most the budget.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lamina_cli
from capped import run_capped
from report import gigabytes, parse_size, record, run_main, stamp, table, versions

WAYS = ("generate_batch", "manager")
SHORTEST = 10
PAUSE = 0.05  # seconds at the most between two requests of a server


def inside(given: argparse.Namespace) -> dict[str, object]:
    """One way, in this process."""
    from transformers import GenerationConfig

    from lamina import AutoModel

    model = AutoModel.from_pretrained(given.model, memory=given.memory, context=given.context)
    if given.tokenizer:
        len(model.tokenizer)
    after_loading = model.lamina.stats.peak_rss_bytes
    chance = random.Random(0)
    lengths = [chance.randint(SHORTEST, given.longest) for _ in range(given.requests)]
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [[chance.randrange(vocabulary) for _ in range(length)] for length in lengths]
    config = GenerationConfig(max_new_tokens=given.new_tokens, do_sample=given.sample, pad_token_id=0, eos_token_id=-1)
    began = time.perf_counter()
    answers = list({"generate_batch": at_once, "manager": one_by_one}[given.inside](model, prompts, config, chance))
    took = time.perf_counter() - began
    whole = [a for a in answers if a.error is None and len(a.generated_tokens) == given.new_tokens]
    stats = model.lamina.stats
    return {
        "ended_well": len(whole),
        "errors": sorted({a.error for a in answers if a.error is not None})[:3],
        "prompt_and_new_tokens_per_second": round((sum(lengths) + given.new_tokens * len(lengths)) / took, 1),
        "passes": stats.passes,
        "peak_after_loading_bytes": after_loading,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "context_tokens": model.lamina.plan.budget.context_tokens,
        "streamed_bytes_per_pass": model.lamina.plan.bytes_streamed_per_pass,
    }


def at_once(model: Any, prompts: list[list[int]], config: Any, chance: random.Random) -> Iterator[Any]:
    yield from model.generate_batch(prompts, config).values()


def one_by_one(model: Any, prompts: list[list[int]], config: Any, chance: random.Random) -> Iterator[Any]:
    manager = model.init_continuous_batching(config)
    manager.start()
    waiting, ended = list(prompts), 0
    while ended < len(prompts) and manager.is_running():
        if waiting:
            manager.add_request(waiting.pop(), max_new_tokens=config.max_new_tokens)
        answer = manager.get_result(timeout=chance.random() * PAUSE if waiting else 1)
        if answer is not None and answer.is_finished():
            ended += 1
            yield answer
    manager.stop()


def proof(way: str, given: argparse.Namespace) -> dict[str, object]:
    """One way, under its cap."""
    print(f"batch_memory.py: {way} at {gigabytes(given.memory)}", file=sys.stderr)
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--inside", way]
    run = run_capped(command, given.memory, timeout=given.timeout)
    line = lamina_cli.cost(run) | (run.last_json() if run.failure is None else {})
    kept = run.failure is None and run.peak_rss_bytes <= given.memory
    passed = kept and line["ended_well"] == given.requests
    return {"way": way, "budget_bytes": given.memory, "requests": given.requests, "passed": passed} | line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=parse_size, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--longest", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=4, help="of each request")
    parser.add_argument("--context", type=int, help="that the model is loaded with; default: Lamina's own")
    parser.add_argument("--sample", action="store_true", help="draw tokens, which takes copies of the logits")
    parser.add_argument("--tokenizer", action="store_true", help="load the tokenizer too, as a server does")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one way")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--inside", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.inside:
        print(json.dumps(inside(given)))
        return
    said = stamp() | {"packages": versions()}
    lines = [proof(way, given) for way in given.ways]
    if not given.no_record:
        for line in lines:
            record("batch_memory", said | line)
    rows = [
        (
            line["way"],
            gigabytes(line["budget_bytes"]),
            gigabytes(line["process_peak_bytes"]),
            gigabytes(line["cgroup_peak_bytes"]),
            f"{line.get('ended_well', 0)} of {line['requests']}",
            line.get("prompt_and_new_tokens_per_second", "-"),
            "kept" if line["passed"] else f"BROKEN: {line['failure'] or 'see the peak and what ended well'}",
        )
        for line in lines
    ]
    head = ("way", "budget", "peak RSS", "cgroup peak", "ended well", "tokens/s", "promise")
    print(table(rows, head))
    passed = all(line["passed"] for line in lines)
    print(json.dumps(said | {"passed": passed, "proofs": lines}))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    run_main(main)
