"""A cache that outgrows its plan keeps the memory that was given, or is refused before it has taken more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lamina
from compat.grow import CHUNK, MOST
from helpers.tiny import write_llama

pytestmark = pytest.mark.compat
HEADS, HEAD_SIZE, LAYERS = 32, 128, 4
TOKEN = 2 * 4 * HEADS * HEAD_SIZE * LAYERS  # bytes of fp32 in the cache
WHOLE = TOKEN * MOST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of little weight whose cache is large: 0.13 MB a token."""
    return write_llama(
        tmp_path_factory.mktemp("wide"), vocab_size=128, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_SIZE, max_position_embeddings=MOST,
    )  # fmt: skip


def grown(folder: Path, more: int) -> dict[str, Any]:
    """What `compat.grow` prints."""
    source = Path(lamina.__file__).parents[1]
    path = os.pathsep.join([str(source), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compat.grow", str(folder), str(more)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_cache_for_which_there_is_no_room_is_refused(folder: Path) -> None:
    result = grown(folder, WHOLE // 4)
    assert result["peak"] <= result["budget"], result
    assert CHUNK < result["tokens"] < MOST
    assert "needs at least" in result["refused"]


def test_a_cache_for_which_there_is_room_grows(folder: Path) -> None:
    result = grown(folder, WHOLE + WHOLE // 2)
    assert result["peak"] <= result["budget"], result
    assert (result["tokens"], result["refused"]) == (MOST, "")
