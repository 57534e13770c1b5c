"""What became of a kept library on the disk never ends a process: it is compiled again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.kernel_stub import stub_source

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

WHOLE_AGAIN = """
import random, sys
from pathlib import Path
from faults.test_kernel_cache import damage
from lamina.codec import native

native.SOURCE = Path(sys.argv[1])
cache, rounds, chance = Path(sys.argv[2]), int(sys.argv[3]), random.Random(0)
assert native.missing() == "", native.missing()
for number in range(rounds):
    (kept,) = cache.rglob("*.so")
    whole = kept.read_bytes()
    done = damage(kept, chance)
    native._state = native._State()
    print(number, done, flush=True)
    assert native.missing() == "", native.missing()
    (again,) = cache.rglob("*.so")
    assert again.read_bytes() == whole, "it was not compiled again"
    assert [path.name for path in again.parent.iterdir()] == [again.name], "something is left there"
"""


def damage(path: Path, chance: random.Random) -> str:
    """Do to a file what power cuts, full disks and bad ones do; what was done."""
    content = bytearray(path.read_bytes())
    at = chance.choice([0, 1, 64, 4096, len(content) - 1, chance.randrange(len(content))])
    length = chance.choice([1, 512, 4096, len(content)])
    kind = chance.choice(["cut", "zeros", "flipped", "longer", "text", "others may write"])
    changed = {
        "cut": content[:at],
        "zeros": content[:at] + bytes(len(content[at : at + length])) + content[at + length :],
        "flipped": content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
        "longer": content + bytes(length),
        "text": bytearray(b"#!/bin/sh\n") * (at // 10),
        "others may write": content,
    }[kind]
    other = path.with_suffix(".new")  # not in place: this process still has the old one loaded
    other.write_bytes(changed)
    other.chmod(0o777 if changed == content else 0o700)
    other.replace(path)
    return f"{kind} at {at} of {len(content)}, {length} long"


def outcome(tmp_path: Path, rounds: int) -> subprocess.CompletedProcess[str]:
    (tmp_path / "kernels.c").write_text(stub_source())
    command = [sys.executable, "-c", WHOLE_AGAIN, str(tmp_path / "kernels.c"), str(tmp_path / "cache"), str(rounds)]
    paths = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("rounds", [15, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_library_is_compiled_again(tmp_path: Path, rounds: int) -> None:
    done = outcome(tmp_path, rounds)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == rounds
