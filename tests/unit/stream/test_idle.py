"""How much may be prefetched: what the drive has time for between a call's last expert and the next call."""

from __future__ import annotations

from lamina.stream.expert_cache import NOTICED, Idle

MB = 1_000_000


def a_pass(idle: Idle, at: float, *, wait: float, compute: float, nbytes: int = 10 * MB, calls: int = 3) -> float:
    """Calls one after the other, each waiting for what it asked and then computing; when the pass is over."""
    for place in range(calls):
        idle.call(at, place)
        if wait:
            idle.asked(nbytes)
            idle.waited(at, at + wait)
        at += wait + compute
    return at


def test_nothing_is_known_before_the_second_call() -> None:
    idle = Idle()
    assert idle.nbytes == 0
    idle.call(5.0, 0)
    idle.asked(MB)
    idle.waited(5.0, 5.5)
    assert idle.nbytes == 0


def test_the_time_of_computing_at_the_rate_of_reading() -> None:
    idle = Idle()
    a_pass(idle, 100.0, wait=0.010, compute=0.004)
    assert abs(idle.nbytes - 4 * MB) < 1000  # 4 ms at 1 GB/s


def test_what_lies_between_two_passes_is_not_counted() -> None:
    idle = Idle()
    end = a_pass(idle, 0.0, wait=0.010, compute=0.004)
    a_pass(idle, end + 60.0, wait=0.010, compute=0.004)
    assert abs(idle.nbytes - 4 * MB) < 1000


def test_a_call_that_reads_nothing_is_idle_from_its_start() -> None:
    idle = Idle()
    end = a_pass(idle, 0.0, wait=0.010, compute=0.004)
    for _ in range(100):
        end = a_pass(idle, end, wait=0, compute=0.008)
    assert abs(idle.nbytes - 8 * MB) < 0.1 * MB  # the rate is remembered


def test_too_short_to_be_a_wait() -> None:
    idle = Idle()
    for place in range(3):
        idle.call(place * 1.0, place)
        idle.asked(MB)
        idle.waited(place * 1.0, place * 1.0 + NOTICED / 2)
    assert idle.nbytes == 0  # no rate was measured


def test_a_faster_drive_is_noticed() -> None:
    idle = Idle()
    end = a_pass(idle, 0.0, wait=0.010, compute=0.004)
    before = idle.nbytes
    for _ in range(30):
        end = a_pass(idle, end, wait=0.005, compute=0.004)
    assert 1.8 * before < idle.nbytes < 2.2 * before
