"""One run of experts.py, in the process that it measures; one JSON line on stdout.

    python benchmarks/experts_run.py .cache/bench/mixtral-12gb --memory 3600000000 --new-tokens 16
    python benchmarks/experts_run.py FOLDER --memory 1500000000 --text novel.txt --prompt-tokens 128 --new-tokens 128

Without --text it is `lamina.measure.bench.bench_model`: greedy tokens, the bare disk in turns with the steps. With
--text each decode step is given the text's own next token, so that the experts are those of real text; the bare disk is
measured before the model is loaded and after it is closed, for the steps follow each other as in real use.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from lamina import AutoModel
from lamina.checkpoint import open_checkpoint
from lamina.host import peak_resident_bytes
from lamina.measure.bench import bench_model
from lamina.stream.probe import SETTINGS, measure_disk

PROBED = 512 << 20  # bytes that each reader setting reads of the bare disk


def greedy(given: argparse.Namespace) -> dict[str, Any]:
    return bench_model(
        str(given.folder),
        memory=given.memory,
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.new_tokens,
        load=AutoModel.from_pretrained,
        draft=None,
    )


def bare_disk(folder: Path) -> float:
    """Bytes per second of the drive on this checkpoint's own files, by the best of the reader's settings."""
    extents = [entry.extent for entry in open_checkpoint(folder).tensors.values() if entry.extent.length]
    extents.sort(key=lambda extent: (extent.file, extent.offset))
    return measure_disk(extents, PROBED, SETTINGS)


def read_along(given: argparse.Namespace) -> dict[str, Any]:
    """Teacher forced: a prefill of the text's first tokens, then a step for each of the following ones."""
    before = bare_disk(given.folder)
    wanted = given.prompt_tokens + given.new_tokens
    model = AutoModel.from_pretrained(str(given.folder), memory=given.memory, context=wanted)
    ids = model.tokenizer(given.text.read_text(), return_tensors="pt").input_ids[:, :wanted]
    if ids.shape[1] < wanted:
        raise SystemExit(f"{given.text} has {ids.shape[1]} tokens: {wanted} are needed")
    with model.lamina, torch.no_grad():
        cache = DynamicCache(config=model.config)
        began = time.perf_counter()
        logits = model(ids[:, : given.prompt_tokens], past_key_values=cache, logits_to_keep=1).logits
        prefill = time.perf_counter() - began
        at_first = model.lamina.stats
        steps, surprise = [], []
        for i in range(given.prompt_tokens, wanted):
            surprise.append(-logits[0, -1].float().log_softmax(-1)[ids[0, i]].item())
            began = time.perf_counter()
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits
            steps.append(time.perf_counter() - began)
        stats, plan, peak = model.lamina.stats, model.lamina.plan, peak_resident_bytes()
    disk = statistics.harmonic_mean([before, bare_disk(given.folder)])
    read = stats.bytes_read - at_first.bytes_read
    measured = {
        "seconds_per_token": statistics.median(steps),
        "mean_seconds_per_token": statistics.mean(steps),
        "prefill_seconds": prefill,
        "read_bytes_per_token": read / len(steps),
        "read_bytes_per_second": read / sum(steps),
        "disk_bytes_per_second": disk,
        "disk_bytes_per_second_before": before,
        "disk_fraction": read / sum(steps) / disk,
        "peak_rss_bytes": peak,
        "perplexity": math.exp(statistics.mean(surprise)),
        "step_seconds": steps,
        "stats_after_prefill": asdict(at_first),
        "plan": plan.as_dict(),
    }
    return asdict(stats) | of_experts(plan, read / len(steps)) | measured


def of_experts(plan: Any, read: float) -> dict[str, float]:
    """Of the bytes that a step reads: those of experts, and the share of the routed ones that were there already.

    Args:
        read: mean bytes of a step, what streams by in every pass included.
    """
    routed = sum(module.routed_bytes for module in getattr(plan, "experts", ()))
    if not routed:  # whole layers, or nothing is left on disk
        return {}
    missed = max(read - plan.bytes_streamed_per_pass, 0.0)
    return {"expert_bytes_per_token": missed, "expert_hit_rate": 1 - missed / routed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, required=True, help="bytes")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--text", type=Path, help="a text to read along in place of greedy tokens")
    given = parser.parse_args()
    print(json.dumps((read_along if given.text else greedy)(given)))


if __name__ == "__main__":
    main()
