"""The simulated accelerator for the tests of this folder, each file of them in a process of its own.

Loading the backend changes the process: torch has an accelerator from then on, which `device="auto"` takes. So the
files here are run by a pytest of their own, whose reports this one hands on as if the tests had run in it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simulated import backend
from simulated.backend import Accelerator, Register

REPORTS = "LAMINA_SIMULATED_REPORTS"  # set in the process that has the accelerator: the file to write reports to
_reports: dict[Path, dict[str, list[Any]]] = {}


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Run a file's tests in another process when the first of them comes; give each test's reports."""
    if REPORTS in os.environ or Path(__file__).parent not in item.path.parents:  # this hook is called for every test
        return None
    if item.path not in _reports:
        _reports[item.path] = _run_apart(item)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports[item.path].get(item.nodeid, []):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS in os.environ:
        with open(os.environ[REPORTS], "a", encoding="utf-8") as out:
            out.write(json.dumps(report._to_json(), default=str) + "\n")


def _run_apart(item: pytest.Item) -> dict[str, list[Any]]:
    """Reports of all selected tests of the item's file, by test."""
    wanted = [each.nodeid for each in item.session.items if each.path == item.path]
    folder = Path(item.config._tmp_path_factory.mktemp("simulated"))  # type: ignore[attr-defined]
    out = folder / "reports"
    out.touch()
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-m", "", *wanted]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, f"--basetemp={folder / 'tmp'}"], cwd=item.config.rootpath, env=environment | {REPORTS: str(out)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    reports = defaultdict(list)
    for line in out.read_text(encoding="utf-8").splitlines():
        report = pytest.TestReport._from_json(json.loads(line))
        reports[report.nodeid].append(report)
    for each in item.session.items:
        if each.path == item.path and not any(report.when == "teardown" for report in reports[each.nodeid]):
            reports[each.nodeid].append(_died(each, ran))
    return reports


def _died(item: pytest.Item, ran: subprocess.CompletedProcess[str]) -> pytest.TestReport:
    """The report of a test that the other process did not end."""
    text = (
        f"the process with the simulated accelerator ended with {ran.returncode} in or before this test:\n{ran.stdout}"
    )
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")


@pytest.fixture(scope="session")
def plugged_in() -> Accelerator:
    """The accelerator, built where it never was; its tests are skipped where it cannot be."""
    reason = backend.why_not()
    if reason is not None:
        pytest.skip(reason)
    return backend.accelerator()


@pytest.fixture
def accelerator(plugged_in: Accelerator, request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """The accelerator with nothing on it. After the test, and without its help, nothing may be left on it."""
    gc.collect()
    plugged_in.reset()
    before, failed = plugged_in.bytes_in_use, request.session.testsfailed
    yield plugged_in
    if request.session.testsfailed > failed:  # its traceback holds what it held
        return
    gc.collect()
    left = {
        "pins": plugged_in.pins,
        "pending": plugged_in.pending_copies,
        "bytes": max(0, plugged_in.bytes_in_use - before),
        "strays": plugged_in.counts["strays"],
        "torn": plugged_in.counts["torn"],
    }
    assert not any(left.values()), left


@pytest.fixture
def register(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Register:
    """The register of pinned memory that the stream finds for the simulated device."""
    from lamina.stream import device

    made = Register(accelerator)
    monkeypatch.setattr(device, "registrar", lambda _: made)
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
