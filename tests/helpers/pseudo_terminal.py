"""A pseudo-terminal: a program that believes to be talked to by a person, for tests."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

PATIENCE_S = 120


class Terminal:
    """A process at a terminal of its own; `screen` is all that it has written."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._ours, its = pty.openpty()
        self.screen = ""
        self._seen = 0
        self.process = subprocess.Popen(
            command,
            stdin=its,
            stdout=its,
            stderr=its,
            env={"TERM": "xterm-256color", **environment},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(its)

    def type(self, keys: str) -> None:
        """All at once, as a paste comes."""
        os.write(self._ours, keys.encode())

    def expect(self, text: str) -> str:
        """Wait until `text` is written after what was expected last; gives what stands before it."""
        ends = time.monotonic() + PATIENCE_S
        while (at := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < ends, f"{text!r} never came: {self.screen[self._seen :]!r}"
            assert self._read(), f"ended before {text!r}: {self.screen[self._seen :]!r}"
        before, self._seen = self.screen[self._seen : at], at + len(text)
        return before

    def end(self) -> int:
        """Wait for the end of the process; its exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=PATIENCE_S)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], PATIENCE_S)[0]:
            return False
        try:
            got = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.screen += got.decode(errors="replace")
        return bool(got)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
