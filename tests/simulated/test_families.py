"""Every family on the simulated accelerator at the smallest budgets: plain transformers' answers, nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.families import FAMILIES, write_tiny
from helpers.judge import steady, traced_once
from simulated.backend import Accelerator, Register
from simulated.loading import assert_same, judged, load, minimum, said

# Chances that a copy and a computation are done when they may be: one of them late, the other, both, and at random.
SCHEDULES = [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.5, 0.5)]


@pytest.fixture(scope="module", autouse=True)
def steadily() -> Iterator[None]:
    with steady(), traced_once():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path, accelerator: Accelerator, register: Register) -> None:
    write_tiny(family, tmp_path)
    accelerator.schedule(1.0, 1.0)
    ids, wanted = judged(tmp_path, accelerator, family)
    least = minimum(tmp_path, accelerator)
    accelerator.driver.reset_counts()
    accelerator.schedule(*SCHEDULES[FAMILIES.index(family) % len(SCHEDULES)])
    model = load(tmp_path, accelerator, memory=least.memory, device_memory=least.device_memory)
    with model.lamina:
        assert_same(said(model, ids), wanted)
        assert model.lamina.plan.streams
    assert set(register.codes) <= {0}
    assert accelerator.counts["pageable_copies"] == 0
