"""What `bench` counts, beside readers that are told when to deliver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.walker import watchdog
from lamina.measure.bench import _Meter
from lamina.plan.layout import Read
from lamina.stream.direct_io import Area, PlainFile
from lamina.stream.readers import Readers

NBYTES = 4096


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


def test_a_step_ends_with_the_reads_that_are_under_way(tmp_path: Path) -> None:
    """Bytes that arrive while a step is measured are its bytes, and what would follow them is not begun."""
    (tmp_path / "weights").write_bytes(bytes(2 * NBYTES))
    begun, deliver = threading.Event(), threading.Event()

    class Slow(PlainFile):
        def read_into(self, target: memoryview, offset: int, needed: int) -> None:
            begun.set()
            deliver.wait()
            super().read_into(target, offset, needed)

    path = str(tmp_path / "weights")
    readers = Readers(threads=1, opener=Slow)
    try:
        reads = [Read(path, at, NBYTES, at, NBYTES, True) for at in (0, NBYTES)]
        ticket = readers.submit(reads, Area(2 * NBYTES))
        begun.wait()

        def deliver_once_paused() -> None:
            while not readers._shared.paused:
                time.sleep(0.001)
            deliver.set()

        threading.Thread(target=deliver_once_paused, daemon=True).start()
        meter = _Meter.__new__(_Meter)
        meter.engine = SimpleNamespace(readers=readers)  # type: ignore[assignment]
        assert meter._settled()[1] == NBYTES, "the read under way counts, the next one has not begun"
        readers.wait(ticket)
        assert readers.bytes_read == 2 * NBYTES, "reading continues afterwards"
    finally:
        deliver.set()
        readers.close()
