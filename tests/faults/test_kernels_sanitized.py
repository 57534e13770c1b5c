"""The kernels do nothing that C leaves undefined and touch no byte that is not theirs, whatever a panel holds."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.codec import native

DRIVER = Path(__file__).with_name("kernel_driver.py")
CHECKED = ("-g", "-fsanitize=undefined,float-cast-overflow,address", "-fno-sanitize-recover=all")
MACHINES = [
    ("-O0", "-march=native"),
    pytest.param(("-O2", "-march=native"), marks=pytest.mark.slow),
    pytest.param(("-O0", "-DQUICKER=1"), marks=pytest.mark.slow),
    pytest.param(
        ("-O1", "-mavx2", "-mfma"),
        marks=[pytest.mark.slow, pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86 alone")],
    ),
]


def built(folder: Path, flags: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    """A checked library, and the environment in which Python loads it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler whose sanitizers can be loaded before Python")
    library = folder / "kernels.so"
    usual = [flag for flag in native.FLAGS if flag != "-O3"]
    command = [compiler, *usual, *flags, *CHECKED, "-o", str(library), str(native.SOURCE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode and ("sanitize" in done.stderr or "cannot find" in done.stderr):
        pytest.skip(f"the compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # else small buffers have no guarded bytes beside them
    }
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library)]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if tried.returncode:
        pytest.skip(f"Python does not start with the sanitizers loaded: {tried.stderr.strip()[-200:]}")
    return library, environment


@pytest.mark.parametrize("flags", MACHINES, ids=" ".join)
@pytest.mark.parametrize("rounds", [250, pytest.param(20_000, marks=pytest.mark.slow)])
def test_hostile_bytes_in_random_shapes(tmp_path: Path, flags: tuple[str, ...], rounds: int) -> None:
    library, environment = built(tmp_path, flags)
    command = [sys.executable, str(DRIVER), str(library), "0", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, (done.stdout[-60:], done.stderr[-3000:])
    assert len(done.stdout.splitlines()) == rounds
