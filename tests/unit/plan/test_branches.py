"""What a pass over text does not go through: planned beside it, and never at its cost."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.schedules import mixture, random_schedule, towered
from lamina.errors import BudgetError
from lamina.plan.layout import widest_window
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan, minimum_memory, resident_size
from lamina.plan.schedule import Cut, Schedule

RESERVED = {"overhead_bytes": 3000, "activation_bytes": 500, "kv_cache_bytes": 200, "context_tokens": 64}


def aside(schedule: Schedule) -> set[str]:
    return {name for branch in schedule.branches for name in branch.touched()}


def passing(schedule: Schedule) -> set[str]:
    weights = schedule.weights
    return {n for n in schedule.root.touched() if not (weights[n].always or weights[n].gathered)}


def at_minimum(schedule: Schedule, more: int = 0, device_more: int | None = None) -> Plan:
    """A plan with the least memory and `more`; on a device if `device_more` is given, with that much more there."""
    budget = Budget(1, **RESERVED)
    if device_more is not None:
        budget = dataclasses.replace(budget, device_memory_bytes=1)
    least, least_device = minimum_memory(schedule, budget)
    budget = dataclasses.replace(budget, memory_bytes=least + more)
    if device_more is not None:
        budget = dataclasses.replace(budget, device_memory_bytes=least_device + device_more)
    return make_plan(schedule, budget)


def weights_of(plan: Plan, indices: tuple[int, ...]) -> set[str]:
    return {part.weight for index in indices for part in plan.items[index].parts}


def check(schedule: Schedule, plan: Plan) -> None:
    """What holds for every plan with branches."""
    budget = plan.budget
    apart = {name for branch in plan.branches for name in weights_of(plan, branch)}
    arena = resident_size(schedule.weights[name] for name in plan.resident)
    assert not weights_of(plan, plan.steps) & aside(schedule), "a pass over text reads nothing of a branch"
    assert apart == aside(schedule) - plan.resident
    assert {*plan.steps, *(i for branch in plan.branches for i in branch)} == set(range(len(plan.items)))
    assert bool(plan.ring_bytes) == bool(plan.items)
    assert not plan.resident & aside(schedule) or passing(schedule) - plan.resident <= {
        weight.name for module in plan.experts for weight in module.weights
    }
    calls = {branch.module: branch for branch in schedule.branches}
    for branch in plan.branches:
        items = [plan.items[i] for i in branch]
        call = next(c for c in calls.values() if items[0].module in {inner.module for inner in c.walk()})
        order = {inner.module: place for place, inner in enumerate(call.walk())}
        places = [(order[item.module], item.block) for item in items]
        assert places == sorted(places)
        rebased = tuple(range(len(items)))
        assert plan.ring_bytes >= widest_window(call, items, rebased) + max(item.nbytes for item in items)
        assert not any(item.cached for item in items)
    if budget.device_memory_bytes is None:
        assert arena + plan.ring_bytes + plan.expert_cache_bytes + budget.reserved_bytes <= budget.memory_bytes
    else:
        assert arena + plan.device_ring_bytes + budget.reserved_bytes_on_device <= budget.device_memory_bytes
        assert plan.ring_bytes + budget.reserved_bytes <= budget.memory_bytes
        assert bool(plan.device_ring_bytes) == bool(plan.items)


def test_a_branch_is_cut_and_no_part_of_a_pass() -> None:
    schedule, _ = towered()
    plan = at_minimum(schedule)
    check(schedule, plan)
    (branch,) = plan.branches
    assert weights_of(plan, branch) == aside(schedule)
    assert plan.bytes_streamed_per_pass == sum(plan.items[i].layout.read_bytes for i in plan.steps)
    assert plan.streams


def test_a_branch_is_no_part_of_what_a_token_needs() -> None:
    schedule, _ = towered()
    without = dataclasses.replace(schedule, branches=())
    assert at_minimum(schedule).active_bytes_per_token == at_minimum(without).active_bytes_per_token


@pytest.mark.parametrize("width", [16, 256, 1024])
def test_the_minimum_holds_the_largest_unit_twice(width: int) -> None:
    schedule, _ = towered(width=width)
    plan = at_minimum(schedule)
    check(schedule, plan)
    always = resident_size(weight for weight in schedule.weights.values() if weight.always)
    room = plan.minimum_memory_bytes - plan.budget.reserved_bytes - always
    assert room >= 2 * max(item.nbytes for item in plan.items)
    with pytest.raises(BudgetError):
        make_plan(schedule, dataclasses.replace(plan.budget, memory_bytes=plan.minimum_memory_bytes - 1))


def test_a_branch_of_large_units_raises_the_minimum() -> None:
    schedule, checkpoint = towered(layers=2, hidden=16, width=512)
    without = at_minimum(dataclasses.replace(schedule, branches=()))
    largest = 0
    for name in aside(schedule):  # such that no unit is a part of one
        weight = checkpoint.weights[name] = dataclasses.replace(checkpoint.weights[name], cut=Cut.WHOLE)
        largest = max(largest, weight.nbytes)
    plan = at_minimum(schedule)
    check(schedule, plan)
    assert plan.minimum_memory_bytes >= 2 * largest > without.minimum_memory_bytes


def test_a_branch_stays_only_after_everything_else() -> None:
    schedule, _ = towered(hidden=1024, width=4096)  # several units of the largest size
    seen = set()
    for more in range(0, schedule.nbytes + 300_000_000, 10_000_000):
        plan = at_minimum(schedule, more)
        check(schedule, plan)
        resident = plan.resident & aside(schedule)
        seen.add((bool(plan.steps), bool(plan.branches), bool(resident)))
    assert seen == {(True, True, False), (False, True, False), (False, True, True), (False, False, True)}


@pytest.mark.parametrize("on_device", [False, True])
def test_where_all_but_the_branch_fits_there_is_a_ring(on_device: bool) -> None:
    schedule, _ = towered(hidden=1024, width=4096)
    room = resident_size(schedule.weights[name] for name in passing(schedule)) + 100_000_000
    plan = at_minimum(schedule, room, room if on_device else None)
    check(schedule, plan)
    assert not plan.steps
    assert plan.branches and plan.streams and plan.ring_bytes
    assert passing(schedule) <= plan.resident
    assert bool(plan.device_ring_bytes) is on_device
    assert plan.bytes_streamed_per_pass == 0


def test_what_is_not_kept_does_not_become_resident() -> None:
    schedule, _ = towered()
    whole = at_minimum(schedule, 10 * schedule.nbytes)
    assert whole.resident == frozenset(schedule.weights) and not whole.branches
    keep = frozenset(schedule.weights) - aside(schedule)
    plan = make_plan(schedule, whole.budget, keep=keep)
    check(schedule, plan)
    assert plan.branches and not plan.steps


def test_without_weights_that_are_held_elsewhere() -> None:
    schedule, _ = towered()
    gone = {name for name in aside(schedule) if "up" in name}
    less = schedule.without(gone)
    assert aside(less) == aside(schedule) - gone
    check(less, at_minimum(less))


def test_a_branch_beside_experts() -> None:
    schedule, _ = towered(main=mixture(2, 64, 32, 4))
    for more in (0, 20_000, 60_000, 120_000, 300_000, 10**7):
        check(schedule, at_minimum(schedule, more))
        check(schedule, at_minimum(schedule, more, more // 2))


def test_two_branches_are_cut_apart() -> None:
    schedule, disk = towered(main=towered(blocks=2))
    twin = dataclasses.replace(schedule.branches[1], module="ear")
    names = [f"ear.{i}.weight" for i in range(3)]
    for name in names:
        disk.add(name, 40, 40)
    calls = tuple(type(twin)(name.removesuffix(".weight"), (name,)) for name in names)
    schedule = dataclasses.replace(
        schedule, weights=disk.weights, branches=(schedule.branches[1], dataclasses.replace(twin, calls=calls))
    )
    plan = at_minimum(schedule)
    check(schedule, plan)
    assert [weights_of(plan, branch) for branch in plan.branches] == [
        set(branch.touched()) for branch in schedule.branches
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), blocks=st.integers(1, 6), width=st.integers(1, 200), more=st.integers(0, 300_000),
    device_more=st.one_of(st.none(), st.integers(0, 300_000)),
)  # fmt: skip
def test_any_pass_with_a_tower(seed: int, blocks: int, width: int, more: int, device_more: int | None) -> None:
    schedule, _ = towered(blocks=blocks, width=width, main=random_schedule(seed))
    check(schedule, at_minimum(schedule, more, device_more))
