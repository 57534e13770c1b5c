"""How long a step takes: each term by itself, what overlaps and what does not, and what a plan puts into it."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.schedules import llama, mixture
from lamina.plan.forecast import (
    CALL_OPERATIONS,
    EXPERT_OPERATIONS,
    EXPERT_SHARE,
    READ_OPERATIONS,
    UNPACKED_SHARE,
    UNTRACED_OPERATIONS,
    WINDOW_LOST,
    Hardware,
    Work,
    compute_seconds,
    seconds_per_token,
    stream_share,
)
from lamina.plan.plan import Budget
from lamina.plan.planner import make_plan

GB = 10**9
WINDOW = 9 * WINDOW_LOST  # nine tenths of the drive
ROUND = Hardware(1e9, 1e10, 1e10, 5e9, 1e-6)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(streamed_bytes=0.9 * 3e9, window_bytes=WINDOW), 3.0),
        (Work(linked_bytes=2e10), 2.0),
        (Work(plain_bytes=1e10), 1.0),
        (Work(unpacked_bytes=UNPACKED_SHARE * 1e10), 2.0),
        (Work(operations=1e6), 1.0),
        (Work(expert_bytes=EXPERT_SHARE * 1e9), 1.0),
        (Work(), 0.0),
    ],
)
def test_each_term_alone(work: Work, seconds: float) -> None:
    assert seconds_per_token(work, ROUND) == pytest.approx(seconds)


def test_computing_is_a_sum_and_what_overlaps_is_not() -> None:
    busy = Work(plain_bytes=1e10, unpacked_bytes=UNPACKED_SHARE * 5e9, operations=1e6)
    assert compute_seconds(busy, ROUND) == pytest.approx(3.0)
    both = dataclasses.replace(busy, streamed_bytes=0.9 * 3e9, window_bytes=WINDOW)
    assert 3.0 < seconds_per_token(both, ROUND) == pytest.approx(3.0 * 2 ** (1 / 6))
    slow = dataclasses.replace(busy, streamed_bytes=0.9 * 9e9, window_bytes=WINDOW)
    assert seconds_per_token(slow, ROUND) == pytest.approx(9.0, rel=0.002)


def test_reading_takes_its_share_of_the_processor() -> None:
    work = Work(streamed_bytes=0.9 * 1e9, window_bytes=WINDOW, plain_bytes=4e10)
    assert seconds_per_token(work, dataclasses.replace(ROUND, reading_cost=0.25)) == pytest.approx(4.25, rel=0.001)
    assert seconds_per_token(work, ROUND) == pytest.approx(4.0, rel=0.001)


def test_a_small_window_costs_the_drive_time() -> None:
    assert stream_share(WINDOW) == pytest.approx(0.9)
    assert stream_share(WINDOW_LOST) == pytest.approx(0.5)
    little, much = (seconds_per_token(Work(streamed_bytes=1e9, window_bytes=size), ROUND) for size in (5e6, 5e8))
    assert little > 4 * much


def test_experts_overlap_with_nothing() -> None:
    streams = Work(streamed_bytes=0.9 * 2e9, window_bytes=WINDOW)
    both = dataclasses.replace(streams, expert_bytes=EXPERT_SHARE * 1e9)
    assert seconds_per_token(both, ROUND) == pytest.approx(3.0)


def test_a_plan_counts_its_bytes_and_calls() -> None:
    schedule, _ = llama(8, 1024, 4096, 256, 32000)
    calls = sum(1 for _ in schedule.root.walk())
    whole = make_plan(schedule, Budget(64 * GB))
    looked_up = sum(w.nbytes for w in schedule.weights.values() if w.gathered)
    assert whole.work == Work(
        plain_bytes=schedule.nbytes - looked_up, operations=(UNTRACED_OPERATIONS + CALL_OPERATIONS) * calls
    )
    counted = make_plan(dataclasses.replace(schedule, operations=1000), Budget(64 * GB))
    assert counted.work.operations == 1000 + CALL_OPERATIONS * calls
    little = make_plan(schedule, Budget(whole.minimum_memory_bytes))
    assert little.work.streamed_bytes == little.bytes_streamed_per_pass > 0
    assert little.work.operations == whole.work.operations + READ_OPERATIONS * len(little.steps)


def test_a_plan_counts_the_experts_of_a_token() -> None:
    (two, _), (one, _) = (mixture(4, 512, 1024, 8, routed=routed) for routed in (2, 1))
    plans = [make_plan(schedule, Budget(20_000_000)) for schedule in (two, one)]
    assert plans[0].work.operations - plans[1].work.operations == 4 * EXPERT_OPERATIONS
    assert plans[0].work.expert_bytes == plans[0].expert_bytes_per_token > 0


def test_on_an_accelerator_what_streams_crosses_the_link() -> None:
    schedule, _ = llama(8, 1024, 4096, 256, 32000)
    plan = make_plan(schedule, Budget(64 * GB, device_memory_bytes=GB // 5))
    assert not plan.bytes_streamed_per_pass
    assert plan.work.linked_bytes == sum(plan.items[i].nbytes for i in plan.steps) > 0
