"""How the command ends from outside: Ctrl-C at any moment, a reader of stdout that has gone, `python -m lamina`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.test_cli_process import ENVIRONMENT, folder  # noqa: F401  (a fixture)

PROGRAM = [sys.executable, "-m", "lamina"]
# Runs the program, and presses Ctrl-C when what is named first is imported, or opened.
PRESSING = """
import runpy, signal, sys
wanted = sys.argv.pop(1)
def press(event, args):
    global wanted
    if wanted and (event, args[0]) == ("import", wanted) or event == "open" and str(args[0]).endswith(wanted or "?"):
        wanted = None
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(press)
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("lamina", run_name="__main__", alter_sys=True)
"""


def start(*arguments: str, stdout: int = subprocess.PIPE, program: list[str] = PROGRAM) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def test_python_m_lamina_is_the_program() -> None:
    process = start("--version")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("lamina ")


@pytest.mark.parametrize(
    "moment",
    [
        "lamina.cli.main",
        "typer",
        "lamina.checkpoint.header",
        "torch",
        "datetime",  # numpy's C code imports it, and makes an ImportError of whatever goes wrong
        "torch._C",
        "model.safetensors",
    ],
)
def test_ctrl_c_at_any_moment_is_one_line_and_130(moment: str, folder: Path) -> None:  # noqa: F811
    process = start(moment, "run", str(folder), "Hi", "-n", "2", program=[sys.executable, "-c", PRESSING])
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "lamina: interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help")])
def test_a_stdout_that_nobody_reads_ends_quietly(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(*arguments, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
