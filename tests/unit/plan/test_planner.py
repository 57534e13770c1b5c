"""The planner keeps its promises: for any schedule and any budget, without a model."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.schedules import Checkpoint, llama, mixture, random_schedule
from lamina.cli.report import plan_table
from lamina.errors import BudgetError
from lamina.plan.expert_slots import KNOWN
from lamina.plan.layout import widest_window
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import MOST_UNITS, make_plan, resident_size
from lamina.plan.schedule import Call, Convert, Cut, Schedule
from lamina.runtime import budget

GB = 10**9
RESERVED = {"overhead_bytes": 300_000, "activation_bytes": 50_000, "kv_cache_bytes": 20_000, "context_tokens": 64}


def smallest(schedule: Schedule, **reserved: int) -> int:
    with pytest.raises(BudgetError) as caught:
        make_plan(schedule, Budget(1, **reserved))
    return caught.value.minimum_bytes


def check(schedule: Schedule, plan: Plan) -> None:
    """What holds for every plan."""
    budget = plan.budget
    arena = resident_size(schedule.weights[name] for name in plan.resident)
    experts = sum(module.count for module in plan.experts)
    routed = plan.expert_cache_bytes + KNOWN * experts
    if budget.device_memory_bytes is None:
        assert arena + plan.ring_bytes + routed + budget.reserved_bytes <= budget.memory_bytes
        assert plan.device_expert_slots == 0
    else:
        cached = sum(item.nbytes for item in plan.items if item.cached)
        above = plan.device_expert_slots * plan.expert_slot_bytes
        assert plan.ring_bytes + cached + routed + budget.reserved_bytes <= budget.memory_bytes
        assert arena + plan.device_ring_bytes + above + budget.reserved_bytes_on_device <= budget.device_memory_bytes
        assert plan.minimum_device_memory_bytes <= budget.device_memory_bytes
        assert bool(plan.experts) <= plan.device_expert_slots <= experts
    assert bool(plan.experts) <= plan.expert_slots <= experts
    assert all(module.slot_bytes <= plan.expert_slot_bytes for module in plan.experts)
    assert plan.minimum_memory_bytes <= budget.memory_bytes
    if plan.steps:
        largest = max(item.nbytes for item in plan.items)
        assert plan.ring_bytes >= widest_window(schedule.root, plan.items, plan.steps) + largest
        assert set(plan.steps) == set(range(len(plan.items)))
    for name, weight in schedule.weights.items():
        assert not weight.always or name in plan.resident
    in_steps = {part.weight for index in plan.steps for part in plan.items[index].parts}
    on_demand = {weight.name for module in plan.experts for weight in module.weights}
    assert not in_steps & plan.resident and not on_demand & (in_steps | plan.resident | plan.gathered)
    touched = {name for name in schedule.root.touched() if name not in plan.resident}
    assert touched - in_steps - on_demand <= plan.gathered
    for item in plan.items:
        assert item.nbytes == item.layout.nbytes
        assert [placed.part for placed in item.layout.placed] == list(item.parts)


def rows_moved(plan: Plan) -> Counter[tuple[str, int]]:
    """How often a pass moves each row of each weight."""
    return Counter(
        (part.weight, row)
        for index in plan.steps
        for part in plan.items[index].parts
        for row in range(part.first, part.first + part.count)
    )


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 1 << 30), share=st.floats(0, 1.2))
def test_a_budget_at_or_above_the_minimum_is_kept(seed: int, share: float) -> None:
    schedule, _ = random_schedule(seed, scale=random.Random(seed).choice((4096, 300_000)))
    least = smallest(schedule, **RESERVED)
    whole = resident_size(schedule.weights.values()) + Budget(0, **RESERVED).reserved_bytes
    plan = make_plan(schedule, Budget(int(least + share * max(whole - least, 0)), **RESERVED))
    check(schedule, plan)
    if share >= 1:
        assert not plan.streams and plan.bytes_read_per_pass == 0


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_the_minimum_is_enough_and_one_byte_less_is_not(seed: int) -> None:
    schedule, _ = random_schedule(seed, scale=random.Random(seed).choice((4096, 300_000)))
    least = smallest(schedule, **RESERVED)
    with pytest.raises(BudgetError) as caught:
        make_plan(schedule, Budget(least - 1, **RESERVED))
    assert caught.value.minimum_bytes == least
    plan = make_plan(schedule, Budget(least, **RESERVED))
    assert plan.minimum_memory_bytes == least
    check(schedule, plan)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), memory=st.floats(0, 1.1), device=st.floats(0, 1.1))
def test_a_device_s_budget_is_kept_beside_the_host_s(seed: int, memory: float, device: float) -> None:
    schedule, _ = random_schedule(seed, scale=random.Random(seed).choice((4096, 300_000)))
    with pytest.raises(BudgetError) as caught:
        make_plan(schedule, Budget(1 << 40, device_memory_bytes=1, **RESERVED))
    least_device = caught.value.minimum_bytes
    with pytest.raises(BudgetError) as caught:
        make_plan(schedule, Budget(1, device_memory_bytes=1 << 40, **RESERVED))
    least = caught.value.minimum_bytes
    whole = resident_size(schedule.weights.values())
    plan = make_plan(schedule, Budget(least + int(memory * whole),
                                      device_memory_bytes=least_device + int(device * whole), **RESERVED))  # fmt: skip
    check(schedule, plan)
    check(schedule, make_plan(schedule, Budget(least, device_memory_bytes=least_device, **RESERVED)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_every_streamed_row_crosses_once_for_each_call_that_needs_it(seed: int) -> None:
    schedule, _ = random_schedule(seed, share=0.0)
    plan = make_plan(schedule, Budget(smallest(schedule)))
    touches = Counter(name for call in schedule.root.walk() for name in dict.fromkeys(call.touches))
    moved = rows_moved(plan)
    for (name, _), times in moved.items():
        assert times == touches[name] == 1
    for name in {name for name, _ in moved}:
        assert sum(1 for moved_name, _ in moved if moved_name == name) == schedule.weights[name].rows


@pytest.mark.parametrize("memory", [1, 3, 8, 16])
def test_an_8b_model_moves_each_row_once(memory: int) -> None:
    schedule, _ = llama(32, 4096, 14336, 1024, 128256)
    plan = make_plan(schedule, Budget(memory * GB))
    check(schedule, plan)
    for name in {part.weight for item in plan.items for part in item.parts}:
        spans = sorted((p.first, p.count) for item in plan.items for p in item.parts if p.weight == name)
        assert spans[0][0] == 0 and sum(count for _, count in spans) == schedule.weights[name].rows
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize(
    "build",
    [lambda: llama(32, 4096, 14336, 1024, 128256),
     lambda: llama(16, 2048, 8192, 512, 128256, tied=True), lambda: mixture(32, 4096, 14336, 8, 32000)],
    ids=["8b", "1b-tied", "mixtral"],
)  # fmt: skip
def test_more_memory_never_reads_more(build: object) -> None:
    schedule, _ = build()  # type: ignore[operator]
    whole = resident_size(schedule.weights.values())
    least = smallest(schedule)
    read = []
    for step in range(0, 11):
        plan = make_plan(schedule, Budget(max(least, whole * step // 10)))
        check(schedule, plan)
        read.append(plan.bytes_read_per_pass)
    slack = 0.005 * read[0]  # neighbours that are read together or apart
    assert all(b <= a + slack for a, b in itertools.pairwise(read)), [round(r / 1e6) for r in read]
    assert read[-1] == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_what_is_resident_is_spread_evenly(share: float) -> None:
    """No long run without a pause for the disk, and none without work for it."""
    schedule, _ = llama(80, 8192, 28672, 1024, 128256)
    whole = resident_size(schedule.weights.values())
    plan = make_plan(schedule, Budget(int(whole * share)))
    order = [schedule.weights[name] for name in schedule.root.touched() if not schedule.weights[name].always]
    order = [weight for weight in order if weight.name not in plan.gathered]
    kept = sum(weight.nbytes for weight in order if weight.name in plan.resident) / sum(w.nbytes for w in order)
    owed, widest = 0.0, 0.0
    for weight in order:
        owed += weight.nbytes * kept - (weight.nbytes if weight.name in plan.resident else 0)
        widest = max(widest, abs(owed))
    assert widest <= 4 * max(weight.nbytes for weight in order)


def test_what_fits_is_resident() -> None:
    schedule, _ = llama(4, 64, 96, 32, 128)
    whole = resident_size(schedule.weights.values())
    plan = make_plan(schedule, Budget(whole + 1000, overhead_bytes=1000))
    assert plan.resident == frozenset(schedule.weights) and not plan.gathered
    assert (plan.steps, plan.items, plan.ring_bytes, plan.bytes_read_per_pass, plan.units) == ((), (), 0, 0, 0)
    assert make_plan(schedule, Budget(whole + 999, overhead_bytes=1000)).streams


@pytest.mark.parametrize("memory", [2, 8, 24])
@pytest.mark.parametrize("shape", [(80, 8192, 28672, 1024, 128256), (126, 16384, 53248, 1024, 128256)])
def test_70b_and_405b_fit_any_budget_above_a_few_gigabytes(shape: tuple[int, ...], memory: int) -> None:
    schedule, _ = llama(*shape, shard=3)  # type: ignore[misc]
    plan = make_plan(schedule, Budget(memory * GB, overhead_bytes=GB // 2, activation_bytes=GB // 5))
    check(schedule, plan)
    assert plan.units <= MOST_UNITS * 2
    used = plan.resident_bytes + plan.ring_bytes + plan.budget.reserved_bytes
    assert memory * GB - used < 0.35 * GB, "memory that was given and is not used"


def test_rows_are_cut_where_the_kernels_do_not_notice() -> None:
    schedule, _ = llama(2, 4096, 14336, 1024, 128256)
    plan = make_plan(schedule, Budget(smallest(schedule)))
    cut = [part for item in plan.items for part in item.parts if part.count < schedule.weights[part.weight].rows]
    assert cut and all(part.first % 256 == 0 for part in cut)


def test_a_weight_that_passes_need_twice_is_kept_first() -> None:
    disk = Checkpoint()
    names = [disk.add(f"w{i}", 8192, 4096, cut=Cut.ROWS) for i in range(8)]
    layers = [Call(f"layer{i}", (name,)) for i, name in enumerate(names)]
    root = Call("", (), (*layers, layers[3]))
    schedule = Schedule(root, disk.weights, frozenset(layer.module for layer in layers))
    plan = make_plan(schedule, Budget(3 * disk.weights["w0"].nbytes))
    check(schedule, plan)
    assert "w3" in plan.resident


def test_a_module_with_two_callers_is_a_unit_of_its_own() -> None:
    """Bound inside one caller's unit and on its own elsewhere, its hook would take the later step too early."""
    disk = Checkpoint()
    shared = Call("shared", (disk.add("shared", 256, 16, cut=Cut.ROWS),))
    small = Call("small", (), (Call("small.a", (disk.add("a", 256, 16, cut=Cut.ROWS),)), shared))
    large = Call("large", (), (Call("large.b", (disk.add("b", 2048, 64, cut=Cut.ROWS),)), shared))
    filler = Call("filler", (disk.add("c", 8192, 256, cut=Cut.ROWS),))
    schedule = Schedule(Call("", (), (small, filler, large)), disk.weights, frozenset({"small", "large", "filler"}))
    plan = make_plan(schedule, Budget(smallest(schedule)))
    assert plan.streams
    served = {item.module for item in plan.items for part in item.parts if part.weight == "shared"}
    assert served <= {"shared"}


def test_a_model_of_nothing_but_small_and_looked_up_weights() -> None:
    disk = Checkpoint()
    embed = Call("embed", (disk.add("embed", 4096, 64, gathered=True),))
    norm = Call("norm", (disk.add("norm", 64, always=True),))
    schedule = Schedule(Call("", (), (embed, norm)), disk.weights)
    plan = make_plan(schedule, Budget(smallest(schedule)))
    check(schedule, plan)
    assert plan.gathered == {"embed"} and not plan.streams


def test_what_is_cast_is_counted_at_the_size_it_has_in_memory() -> None:
    schedule, disk = llama(4, 256, 512, 64, 128, stored=4)
    assert all(weight.convert is Convert.CAST for weight in disk.weights.values())
    least = smallest(schedule)
    for more in (0, 300_000, 10_000_000):
        check(schedule, make_plan(schedule, Budget(least + more)))


def test_a_small_device_and_a_large_host_read_nothing_from_disk() -> None:
    schedule, _ = llama(32, 4096, 14336, 1024, 128256)
    plan = make_plan(schedule, Budget(64 * GB, device_memory_bytes=4 * GB))
    check(schedule, plan)
    assert plan.streams and all(item.cached for item in plan.items) and plan.bytes_read_per_pass == 0
    both = make_plan(schedule, Budget(8 * GB, device_memory_bytes=4 * GB))
    check(schedule, both)
    little = make_plan(schedule, Budget(2 * GB, device_memory_bytes=4 * GB))
    assert 0 < both.bytes_read_per_pass < little.bytes_read_per_pass


def test_too_small_a_device_says_how_much_it_needs() -> None:
    schedule, _ = llama(8, 1024, 4096, 256, 32000)
    with pytest.raises(BudgetError, match=r"device_memory=.* is too small.* on the device") as caught:
        make_plan(schedule, Budget(64 * GB, activation_bytes=1000, device_memory_bytes=10))
    plan = make_plan(schedule, Budget(64 * GB, activation_bytes=1000, device_memory_bytes=caught.value.minimum_bytes))
    assert plan.minimum_device_memory_bytes == caught.value.minimum_bytes
    check(schedule, plan)


def test_a_plan_is_plain_numbers_for_json() -> None:
    import json

    schedule, _ = llama(4, 64, 96, 32, 128)
    plan = make_plan(schedule, Budget(smallest(schedule)))
    said = json.loads(json.dumps(plan.as_dict()))
    assert said["minimum_memory_bytes"] == said["memory_budget_bytes"] == plan.budget.memory_bytes
    assert said["units"] == len(plan.steps) and said["gathered"] == ["model.embed_tokens.weight"]


def test_the_same_question_gets_the_same_plan() -> None:
    schedule, _ = llama(8, 1024, 4096, 256, 32000)
    budget = Budget(smallest(schedule) + 20_000_000)
    assert make_plan(schedule, budget) == make_plan(schedule, budget)


# -- what a process holds besides


def test_what_a_process_holds_besides_is_reserved_and_said() -> None:
    schedule, _ = llama(4, 64, 128, 32, 256)
    alone = Budget(1, overhead_bytes=1000)
    shared = Budget(1, overhead_bytes=1000, already_held_bytes=500_000_000)
    with pytest.raises(BudgetError) as fresh:
        make_plan(schedule, alone)
    with pytest.raises(BudgetError) as full:
        make_plan(schedule, shared)
    least = fresh.value.minimum_bytes
    assert full.value.minimum_bytes == least + 500_000_000
    assert "already holds" not in str(fresh.value)
    assert "of which 500 MB are for what this process already holds besides (other libraries or data)" in str(
        full.value
    )
    assert f"a process without it needs {least} bytes" in str(full.value)
    plan = make_plan(schedule, Budget(10**10, already_held_bytes=500_000_000)).as_dict()
    assert plan["already_held_bytes"] == 500_000_000
    assert re.search(r"held by this process besides +500 MB", plan_table(plan))
    assert "held by" not in plan_table({**plan, "already_held_bytes": 0})


@pytest.mark.parametrize(
    ("resident", "held"),
    [((370, 380, 430), (0, 0, 0)), ((437, 470), (64, 64)), ((670, 690, 399), (288, 288, 0)), ((370, 670), (0, 288))],
)
def test_what_is_held_is_one_number_until_it_is_clearly_another(
    monkeypatch: pytest.MonkeyPatch, resident: tuple[int, ...], held: tuple[int, ...]
) -> None:
    monkeypatch.setattr(budget, "_last_held", None)
    for now, expected in zip(resident, held, strict=True):
        monkeypatch.setattr(budget, "resident_bytes", lambda now=now: now * 1_000_000)
        assert budget.already_held() == expected * 1_000_000
