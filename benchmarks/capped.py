"""Runs one command in a fresh memory cgroup, with nothing of it in the page cache, and says what it took.

    python benchmarks/capped.py --limit 3GB -- lamina bench .cache/bench/llama-3b --memory 3GB --json

The cap counts what a container's cap counts: the process, its children, and the page cache they cause; swap is not to
be had. Page cache is charged to the cgroup that touched a page first, so caches are dropped before the command starts:
otherwise an earlier run's cache would hide the cap. Both cgroup versions work. Making a cgroup and dropping caches need
root; without it the command runs uncapped and the result says so (`capped`, `dropped_caches`).

The last line on stdout is one JSON object; what the command itself prints comes before it.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from report import MeasuringError, parse_size, run_main

_numbers = itertools.count()


@dataclass(frozen=True)
class Run:
    """What a command took. Bytes throughout; None where this machine cannot tell."""

    command: list[str]
    returncode: int
    wall_seconds: float
    capped: bool
    dropped_caches: bool
    limit_bytes: int | None
    peak_bytes: int | None  # of the cgroup, page cache included
    peak_anonymous_bytes: int | None  # of the cgroup, page cache left out; sampled, so a little under the truth
    peak_rss_bytes: int  # of the largest process, mapped files included
    limit_hits: int | None  # times the cap made the kernel take pages back: ordinary for page cache
    oom_kills: int | None
    stopped_after: float | None  # the timeout that it outlasted
    read_bytes: int | None  # fetched from block devices, by children that it waited for as well
    cpu_seconds: float
    stdout: str
    stderr: str

    @property
    def failure(self) -> str | None:
        """Why the command did not do its work, or None."""
        if self.oom_kills:
            return "killed for memory"
        if self.stopped_after is not None:
            return f"stopped after {self.stopped_after:.0f} s"
        if self.returncode:
            lines = [line for line in self.stderr.splitlines() if line.strip()]
            return f"exit {self.returncode}: {lines[-1][:200] if lines else 'it printed nothing'}"
        return None

    def last_json(self) -> dict[str, object]:
        """The JSON object on stdout: the whole of it, or its last line."""
        for text in (self.stdout, (self.stdout.strip().splitlines() or [""])[-1]):
            with contextlib.suppress(ValueError):
                found = json.loads(text)
                if isinstance(found, dict):
                    return found
        raise MeasuringError(f"{self.command[0]} printed no JSON object, but {self.stdout[-200:]!r}")


class MemoryCgroup:
    """One memory cgroup: version 1 where a memory hierarchy is mounted, else version 2."""

    def __init__(self, root: Path, version: int, limit: int | None) -> None:
        self.version = version
        self.path = root / f"lamina-bench-{os.getpid()}-{next(_numbers)}"
        if version == 2:
            (root / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        if version == 1:
            if limit is not None:
                self._write("memory.limit_in_bytes", limit)
                self._write_if_there("memory.memsw.limit_in_bytes", limit)
            self._write_if_there("memory.swappiness", 0)
        else:
            self._write("memory.max", "max" if limit is None else limit)
            self._write_if_there("memory.swap.max", 0)

    def _write(self, name: str, value: int | str) -> None:
        (self.path / name).write_text(str(value))

    def _write_if_there(self, name: str, value: int | str) -> None:
        with contextlib.suppress(OSError):
            self._write(name, value)

    def _read(self, *names: str) -> int | None:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return int((self.path / name).read_text())
        return None

    def _field(self, name: str, field: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in (self.path / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == field:
                    return int(value)
        return None

    @property
    def peak_bytes(self) -> int | None:
        return self._read("memory.max_usage_in_bytes", "memory.peak")

    @property
    def anonymous_bytes(self) -> int | None:
        return self._field("memory.stat", "total_rss" if self.version == 1 else "anon")

    @property
    def limit_hits(self) -> int | None:
        return self._read("memory.failcnt") if self.version == 1 else self._field("memory.events", "max")

    @property
    def oom_kills(self) -> int | None:
        return self._field("memory.oom_control" if self.version == 1 else "memory.events", "oom_kill")

    def remove(self) -> None:
        """Kill what is left inside and take the cgroup away."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                for pid in (self.path / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            self._write_if_there("memory.force_empty", 0)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)
        print(f"capped.py: {self.path} could not be removed", file=sys.stderr)


def memory_hierarchy() -> tuple[Path, int] | None:
    """Where memory cgroups are made here, and their version; None where there are none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(at), 1
        if kind == "cgroup2" and "memory" in (Path(at) / "cgroup.controllers").read_text().split():
            return Path(at), 2
    return None


@contextlib.contextmanager
def memory_cgroup(limit: int | None) -> Iterator[MemoryCgroup | None]:
    """A cgroup with `limit` bytes (None: only counted), or None and a line on stderr where it cannot be made."""
    found = memory_hierarchy() if sys.platform == "linux" else None
    cgroup = None
    if found is not None:
        try:
            cgroup = MemoryCgroup(*found, limit)
        except OSError as error:
            print(f"capped.py: no memory cgroup ({error}): the command runs uncapped", file=sys.stderr)
    else:
        print("capped.py: this machine has no memory cgroups: the command runs uncapped", file=sys.stderr)
    try:
        yield cgroup
    finally:
        if cgroup is not None:
            cgroup.remove()


def drop_caches() -> bool:
    """Empty the page cache of the machine; False, and a line on stderr, where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"capped.py: page cache not dropped ({error}): an earlier run's cache may help this one", file=sys.stderr)
        return False
    return True


def run_capped(
    command: list[str],
    limit: int | None = None,
    *,
    drop: bool = True,
    environment: dict[str, str] | None = None,
    timeout: float | None = None,
    every: float = 0.1,
) -> Run:
    """Run `command` under `limit` bytes of memory (None: counted, not limited) and wait for it.

    Args:
        drop: empty the page cache first.
        environment: variables set on top of this process's.
        timeout: seconds after which everything in the cgroup is killed.
        every: seconds between two looks at the anonymous memory.
    """
    with memory_cgroup(limit) as cgroup, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        dropped = drop_caches() if drop else False
        # The shell enters the cgroup and becomes the command, so that no byte of the command is charged elsewhere.
        entered = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.path / "cgroup.procs")] if cgroup else []
        started = time.perf_counter()
        process = subprocess.Popen(
            entered + command,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            anonymous, stopped = wait_until_ended(process.pid, cgroup, timeout, every)
            wall = time.perf_counter() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return Run(
            command=command,
            returncode=process.returncode,
            wall_seconds=wall,
            capped=cgroup is not None and limit is not None,
            dropped_caches=dropped,
            limit_bytes=limit,
            peak_bytes=cgroup.peak_bytes if cgroup else None,
            peak_anonymous_bytes=anonymous,
            peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            limit_hits=cgroup.limit_hits if cgroup else None,
            oom_kills=cgroup.oom_kills if cgroup else None,
            stopped_after=timeout if stopped else None,
            read_bytes=usage.ru_inblock * 512 if sys.platform == "linux" else None,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
        )


def wait_until_ended(
    pid: int, cgroup: MemoryCgroup | None, timeout: float | None, every: float
) -> tuple[int | None, bool]:
    """Wait, and leave the reaping to `wait4`, which tells the costs.

    Returns:
        The most anonymous memory seen on the way, and whether it had to be stopped.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    anonymous, stopped = None, False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if cgroup is not None and (now := cgroup.anonymous_bytes) is not None:
            anonymous = max(anonymous or 0, now)
        if deadline is not None and time.monotonic() > deadline:
            print(f"capped.py: stopped after {timeout:.0f} s", file=sys.stderr)
            os.killpg(pid, signal.SIGKILL)
            deadline, stopped = None, True
        time.sleep(every)
    return anonymous, stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_size, help="memory the command may have, e.g. 3GB; default: only counted")
    parser.add_argument("--keep-caches", action="store_true", help="do not empty the page cache first")
    parser.add_argument("--timeout", type=float, help="seconds after which the command is killed")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: put one after --")
    run = run_capped(command, arguments.limit, drop=not arguments.keep_caches, timeout=arguments.timeout)
    sys.stderr.write(run.stderr)
    sys.stdout.write(run.stdout)
    summary = {key: value for key, value in asdict(run).items() if key not in ("stdout", "stderr")}
    print(json.dumps(summary | {"failure": run.failure}))
    sys.exit(1 if run.failure else 0)


if __name__ == "__main__":
    run_main(main)
