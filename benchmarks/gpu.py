"""Whether Lamina keeps its promises on an accelerator: one command, a stage after the other, minutes in all.

    python benchmarks/gpu.py --out gpu.jsonl                                    # every stage, on the card that is there
    python benchmarks/gpu.py --out gpu.jsonl parity capped --cap 4GB            # some of them
    python benchmarks/gpu.py --out dry.jsonl --device cpu --shape tiny          # a dry run
    python benchmarks/gpu.py --out dry.jsonl --shape tiny --device simulated --backend tests/simulated/backend.py

env      what is here: card, memory, driver, versions; what a context, a product and an attention take of the card
link     bytes a second to the card, from ordinary and from pinned memory
stale    whether memory that is mapped again where pinned memory was gives the old bytes: why Lamina unregisters
parity   families of tiny models at their smallest budgets, from disk and from host memory, against transformers on
         the same device: bit for bit, else at most 1e-2 (relative, in bf16) with the family named
capped   a model larger than the card, of which another process holds all but `--cap`: decoding beside the lower of
         drive and link, measured in the same run, and the card's own peak
peers    accelerate (and AirLLM where it is installed) on the same card under the same cap
stores   the model as `4bit` and `lossless` under the cap
drafts   `lookup` and `self`: the same tokens as without, and the time
moe      a mixture of experts under the cap

Each stage runs in a process of its own with a time limit and adds JSON lines to --out; a stage that passed there is not
run again, unless --again is said. What cannot be run on this device is written down as skipped, with the reason.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import BENCH, make_checkpoint, parse_size, run_main, stamp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TINY = ("llama", "qwen3_moe", "gemma3_text", "gpt2")
TOLERANCE = 1e-2  # of the norm of the logits, in bf16
LINKED = 256 << 20
BALLAST = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(free - int(sys.argv[1]), 0), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""
Line = dict[str, Any]


class Skipped(Exception):
    """The stage has nothing to run on here; the message says why."""


def synchronize(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def card(device: Any) -> Line:
    """Bytes that the card says are used, by all processes; empty where it says nothing."""
    import torch

    module: Any = torch.get_device_module(device) if device.type != "cpu" else None
    if module is None or not hasattr(module, "mem_get_info"):
        return {}
    free, total = module.mem_get_info(device)
    return {"card_used_bytes": total - free, "card_bytes": total}


def env(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    import torch

    before = card(device)
    from lamina.runtime.budget import device_overhead, is_unified

    overhead = device_overhead(device) if device.type != "cpu" else 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    yield {"name": name, "overhead_bytes": overhead, "before": before, "after": card(device)} | {
        "unified": device.type != "cpu" and is_unified(device),
        "memlock": str(os.popen("ulimit -l").read().strip()),
    }


def link(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    from lamina.stream.device import device_for
    from lamina.stream.direct_io import Area

    there = device_for(device)
    if there is None:
        raise Skipped("the processor computes where it reads")
    nbytes = LINKED if given.shape != "tiny" else 1 << 20
    source, target = Area(nbytes), there.memory(nbytes)
    source.tensor.fill_(1)

    def rate() -> float:
        took = []
        for _ in range(6):
            began = time.perf_counter()
            there.copy(target, source.tensor[:nbytes], there.computed())
            there.settle()
            took.append(time.perf_counter() - began)
        return nbytes / sorted(took)[2]

    pageable = rate()
    pin = there.pin(source.tensor)
    yield {"pageable_bytes_per_second": pageable, "pinned_bytes_per_second": rate() if pin else None} | {
        "fault": pin.fault if pin else "this device pins no memory"
    }
    if pin:
        pin.release()


def stale(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    import torch

    from lamina.stream.device import device_for, registrar
    from lamina.stream.direct_io import Area

    there = device_for(device)
    if there is None or registrar(torch.device(device)) is None:
        raise Skipped("this device pins no memory")
    target = there.memory(1 << 20)
    seen = []
    for value in (1, 2):
        area = Area(1 << 20)
        area.tensor.fill_(value)
        pin = there.pin(area.tensor)
        there.copy(target, area.tensor, there.computed()).wait()
        seen.append((int(target[0].item()), int(target[-1].item()), area.address))
        assert pin is not None
        pin.release()
        del area, pin
    yield {"seen": seen, "same_address": seen[0][2] == seen[1][2], "passed": [s[:2] for s in seen] == [(1, 1), (2, 2)]}


def _minima(folder: Path, device: Any) -> tuple[int, int]:
    from lamina import AutoModel, BudgetError

    def least(**memory: Any) -> int:
        try:
            AutoModel.from_pretrained(str(folder), device=device, context=64, draft=None, **memory).lamina.close()
        except BudgetError as error:
            return error.minimum_bytes
        return 0

    if device.type == "cpu":
        return least(memory=1), 0
    return least(memory=1, device_memory="4GB"), least(memory="8GB", device_memory=1)


def parity(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.families import FAMILIES, MOE, input_ids, write_tiny
    from lamina import AutoModel

    def answers(model: Any, ids: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            logits = model(ids).logits.cpu()
        return logits, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).cpu()

    for family in TINY if given.shape == "tiny" else FAMILIES:
        folder = given.folder / "tiny" / family
        if not (folder / "config.json").exists():
            write_tiny(family, folder, dtype=torch.bfloat16)
        more = {"experts_implementation": "eager"} if family in MOE else {}
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more).eval().to(device)
        ids = input_ids(plain.config).to(device)
        wanted = answers(plain, ids)
        memory, there = _minima(folder, device)
        for place, extra in (("disk", 0), ("host memory", 60_000_000)):
            on_device = {"device_memory": there} if there else {}
            model = AutoModel.from_pretrained(
                str(folder), device=device, context=64, draft=None, memory=memory + extra, **on_device
            )
            with model.lamina:
                logits, tokens = answers(model, ids)
            off = float((logits.float() - wanted[0].float()).norm() / wanted[0].float().norm())
            same = bool(torch.equal(logits, wanted[0]) and torch.equal(tokens, wanted[1]))
            yield {"family": family, "from": place, "bit_equal": same, "relative": off} | {"passed": off <= TOLERANCE}


@contextlib.contextmanager
def small_card(cap: int, device: Any) -> Iterator[bool]:
    """Another process holds all of the card but `cap` bytes, so that our context and kernels count too."""
    if device.type != "cuda":
        yield False
        return
    held = subprocess.Popen(
        [sys.executable, "-c", BALLAST, str(cap)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdin is not None
    held.stdout.readline()
    try:
        yield True
    finally:
        held.stdin.close()
        held.wait()


def _bench(folder: Path, given: argparse.Namespace, device: Any, memory: str, *more: object) -> Line:
    """`lamina bench` in a process of its own."""
    start = "from lamina.cli.main import main; main()"
    if given.backend:
        start = f"import sys; sys.path[:0]={sys.path[:2]!r}; import gpu; gpu.plug_in({str(given.backend)!r}); " + start
    there = [] if device.type == "cpu" else ["--device-memory", given.cap]
    asked = ["bench", folder, "--memory", memory, "--device", given.device, *there, "--new-tokens", given.tokens]
    command = [sys.executable, "-c", start, *map(str, (*asked, "--json", *more))]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return {"failure": (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300], "passed": False}
    said = json.loads(ran.stdout)
    wanted = (
        "seconds_per_token read_bytes_per_second disk_bytes_per_second bytes_read_per_pass tokens draft drafted_tokens "
        "accepted_tokens peak_rss_bytes minimum_device_memory_bytes"
    )
    return {key: said[key] for key in wanted.split() if key in said}


def _model(given: argparse.Namespace) -> Path:
    return make_checkpoint(given.folder / f"llama-{given.shape}", given.shape)


def capped(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    folder = _model(given)
    with small_card(parse_size(given.cap), device) as held:
        for place, memory in (("disk", "3GB"), ("host memory", "24GB")):
            yield {"from": place, "cap": given.cap, "ballast": held} | _bench(folder, given, device, memory)


def peers(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    if device.type != "cuda":
        raise Skipped("the other engines are measured on CUDA")
    folder, here = _model(given), Path(__file__).parent / "peers"
    left = max(parse_size(given.cap) - 1_200_000_000, 200_000_000)
    common = ["--new-tokens", 4, "--prompt-tokens", 32]
    runs: dict[str, list[object]] = {
        "accelerate": [here / "accelerate_disk_run.py", folder, "--cpu-memory", "1GB", "--device-memory", left]
    }
    if importlib.util.find_spec("airllm") is not None:
        split = folder.with_name(folder.name + "-airllm")
        airllm = [here / "airllm_run.py", folder, "--split", split, "--device", "cuda:0"]
        subprocess.run([sys.executable, *map(str, (*airllm, "--prepare", *common))], capture_output=True)
        runs["airllm"] = airllm
    with small_card(parse_size(given.cap), device):
        for engine, command in runs.items():
            ran = subprocess.run([sys.executable, *map(str, (*command, *common))], capture_output=True, text=True)
            yield {"engine": engine, "code": ran.returncode, "said": ran.stdout[-400:], "error": ran.stderr[-300:]}


def stores(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    folder = _model(given)
    with small_card(parse_size(given.cap), device):
        for compression in ("4bit", "lossless"):
            yield {"compression": compression} | _bench(folder, given, device, "3GB", "--compression", compression)


def drafts(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    folder, first = _model(given), None
    with small_card(parse_size(given.cap), device):
        for draft in ("none", "lookup"):
            line = _bench(folder, given, device, "3GB", "--draft", draft)
            first = first or line.get("tokens")
            yield {"asked": draft, "same_tokens": line.get("tokens") == first} | line


def moe(given: argparse.Namespace, device: Any) -> Iterator[Line]:
    if given.shape == "tiny":
        raise Skipped("--shape tiny: a mixture of experts is among the families of `parity`")
    folder = make_checkpoint(given.folder / "qwen3moe-11gb", "qwen3moe-11gb", script="moe_checkpoints.py")
    with small_card(parse_size(given.cap), device):
        yield _bench(folder, given, device, "3GB")


STAGES: dict[str, tuple[Callable[..., Iterator[Line]], int]] = {  # with seconds that it may take
    "env": (env, 60),
    "link": (link, 60),
    "stale": (stale, 60),
    "parity": (parity, 240),
    "capped": (capped, 150),
    "peers": (peers, 240),
    "stores": (stores, 150),
    "drafts": (drafts, 120),
    "moe": (moe, 120),
}


def plug_in(backend: str | None) -> None:
    """Load a file that gives torch a device: it has a function `accelerator`."""
    if backend:
        sys.path.insert(0, str(Path(backend).resolve().parents[1]))
        spec = importlib.util.spec_from_file_location("backend", backend)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.accelerator()


def run_stage(name: str, given: argparse.Namespace) -> None:
    """In this process, a JSON line for each thing that was tried."""
    import torch

    plug_in(given.backend)
    device = torch.device(given.device)
    about = {"stage": name, "device": given.device, "shape": given.shape, **stamp()}
    try:
        for line in STAGES[name][0](given, device):
            print(json.dumps({**about, "passed": True, **line, **card(device)}), flush=True)
    except Skipped as why:
        print(json.dumps({**about, "passed": None, "skipped": str(why)}), flush=True)


def passed_before(out: Path) -> set[tuple[str, str, str]]:
    """Stages that ended well in an earlier run, with their device and shape."""
    if not out.exists():
        return set()
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
    ends = [line for line in lines if "took_seconds" in line]
    return {(line["stage"], line["device"], line["shape"]) for line in ends if line["passed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, added to what is there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", type=Path, help="a file that makes the device known to torch")
    parser.add_argument("--shape", default="3b", help="of the dense model: tiny, 3b, 8b, 70b")
    parser.add_argument("--folder", type=Path, default=BENCH, help="where checkpoints are or are made")
    parser.add_argument("--cap", default="2GB", help="what the card is to have for us, context and kernels included")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--limit", type=int, help="seconds for each stage; default: its own")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # of the process that runs one
    given = parser.parse_args()
    if given.stage:
        return run_stage(given.stage, given)
    if unknown := set(given.stages) - set(STAGES):
        parser.error(f"no stage named {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    done = set() if given.again else passed_before(given.out)
    failed = 0
    for name in given.stages or STAGES:
        if (name, given.device, given.shape) in done:
            print(f"{name}: passed before")
            continue
        failed += not _apart(name, given)
    if failed:
        sys.exit(1)


def _apart(name: str, given: argparse.Namespace) -> bool:
    """Run a stage in a process of its own; whether nothing of it failed."""
    began, command = time.perf_counter(), [sys.executable, *sys.argv, "--stage", name]
    why = None
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=given.limit or STAGES[name][1])
        said = ran.stdout
        if ran.returncode:
            why = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
    except subprocess.TimeoutExpired as late:
        said, why = (late.stdout or b"").decode(), f"stopped after {late.timeout:.0f} s"
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    good = why is None and bool(lines) and all(line["passed"] is not False for line in lines)
    took = round(time.perf_counter() - began, 1)
    end = {
        "stage": name,
        "device": given.device,
        "shape": given.shape,
        "passed": good,
        "took_seconds": took,
        "why": why,
    }
    with open(given.out, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in (*lines, end))
    skipped = next((line["skipped"] for line in lines if "skipped" in line), None)
    bad = next((line for line in lines if line["passed"] is False), None)
    about = f"skipped: {skipped}" if skipped else "passed" if good else f"FAILED: {why or bad}"
    print(f"{name}: {about} ({len(lines)} lines, {took} s)", flush=True)
    return good


if __name__ == "__main__":
    run_main(main)
