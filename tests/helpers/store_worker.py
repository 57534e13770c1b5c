"""Splits in processes of their own, which a test may kill: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["helpers.store_worker", "lamina.store.splitting", "transformers.models.llama.modeling_llama"]
)
_WATCHED = ("open", "write", "fsync", "replace", "unlink")


@dataclass(frozen=True)
class Outcome:
    """How a split ended.

    Attributes:
        code: of the process; negative where a signal killed it.
        error: class and text of what it raised; empty where nothing.
        result: `SplitResult.as_dict()`.
        stages: that progress was told, each once.
        calls: system calls of a split that change or open files.
    """

    code: int
    error: str
    result: dict[str, Any]
    stages: tuple[str, ...]
    calls: int


def split_apart(
    model: Path,
    to: Path,
    *,
    die_at: int = 0,
    interrupt_at: int = 0,
    file_limit: int = 0,
    slow: float = 0.0,
    start: Any = None,
    **options: Any,
) -> Outcome:
    """Run `lamina.store.split` in another process.

    Args:
        die_at: number of the watched system call before which the process kills itself.
        interrupt_at: the same with Ctrl-C.
        file_limit: bytes that no file may exceed, as a full disk would have it.
        slow: seconds to wait at each report of progress.
    """
    return begin(model, to, die_at=die_at, interrupt_at=interrupt_at, file_limit=file_limit, slow=slow, **options)()


def begin(model: Path, to: Path, **options: Any) -> Callable[[], Outcome]:
    """Start a split in another process; call what comes back to wait for its end."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(theirs, str(model), str(to), options))
    process.start()
    theirs.close()

    def finish() -> Outcome:
        try:
            error, result, stages, calls = ours.recv()
        except EOFError:
            error, result, stages, calls = "", {}, (), 0
        process.join(60)
        code = process.exitcode
        assert code is not None, "the split hangs"
        return Outcome(code, error, result, stages, calls)

    return finish


def _work(pipe: Connection, model: str, to: str, options: dict[str, Any]) -> None:
    import time

    import torch

    from lamina.store import split

    torch.set_num_threads(1)
    slow, limit = options.pop("slow", 0.0), options.pop("file_limit", 0)
    stages: dict[str, None] = {}
    counter = _Counter(options.pop("die_at", 0), options.pop("interrupt_at", 0))

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] = None
        time.sleep(slow)

    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    error, result = "", {}
    counter.watch()
    try:
        result = split(model, to=to, progress=progress, **options).as_dict()
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    pipe.send((error, result, tuple(stages), counter.count))


class _Counter:
    """Counts system calls, and ends the process at one of them."""

    def __init__(self, die_at: int, interrupt_at: int) -> None:
        self.count, self._die_at, self._interrupt_at = 0, die_at, interrupt_at

    def watch(self) -> None:
        for name in _WATCHED:
            setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.count == self._interrupt_at:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return counted


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
