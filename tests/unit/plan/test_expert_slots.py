"""Experts in the plan: where each lies in its slot, how a budget is divided, what the largest models get."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.schedules import Checkpoint, mixture, random_schedule
from lamina.errors import BudgetError
from lamina.plan.expert_slots import IN_FLIGHT, KNOWN, Experts, divide, experts_of, slot_bytes
from lamina.plan.layout import ALIGNMENT, Part
from lamina.plan.plan import Budget
from lamina.plan.planner import make_plan, minimum_memory, resident_size
from lamina.plan.schedule import Call, Convert, Cut, Schedule
from unit.plan.test_layout import check as check_bytes
from unit.plan.test_planner import check as check_plan

GB = 10**9


def module_of(seed: int) -> tuple[Experts, Checkpoint]:
    """Experts with everything that is allowed: weights with fewer experts, odd offsets, merged, cast, in two files."""
    rng = random.Random(seed)
    disk = Checkpoint(seed)
    count = rng.randint(1, 6)
    for i in range(rng.randint(1, 4)):
        held = count if i == 0 else rng.choice((count, count, rng.randint(1, count)))
        rows, columns = rng.choice((1, 2, 7, 16)), rng.choice((1, 3, 64, 500, 2048))
        shape = rng.choice(((held, rows, columns), (held * rows, columns)))
        itemsize = rng.choice((2, 4))
        disk.add(f"w{i}", *shape, file=rng.choice("aab"), gap=rng.choice((0, 0, 6, 100, 5000)), itemsize=itemsize,
                 stored=rng.choice((itemsize, itemsize, 6 - itemsize)), pieces=rng.choice((1, 1, 1, 2, held, 9)),
                 cut=Cut.EXPERTS, experts=held, odd=rng.random() < 0.2)  # fmt: skip
    weights = list(disk.weights.values())
    rng.shuffle(weights)
    return Experts("experts", tuple(weights), count, rng.randint(1, count)), disk


def parts_of(experts: Experts, expert: int) -> list[Part]:
    parts = []
    for weight in experts.weights:
        if expert < weight.experts:
            rows = weight.rows // weight.experts
            parts.append(Part(weight.name, expert * rows, rows))
    return parts


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_every_expert_fits_in_a_slot_and_is_read_as_it_is_stored(seed: int) -> None:
    experts, disk = module_of(seed)
    for expert in range(experts.count):
        layout = experts.layout(expert)
        assert [placed.part for placed in layout.placed] == parts_of(experts, expert)
        assert layout.nbytes <= experts.slot_bytes
        check_bytes(layout, disk)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_nothing_is_read_but_the_expert_and_what_alignment_costs(seed: int) -> None:
    experts, disk = module_of(seed)
    for expert in range(experts.count):
        parts = parts_of(experts, expert)
        stored = sum(len(disk.stored(part)) for part in parts)
        pieces = sum(len(disk.weights[part.weight].pieces_of_rows(part.first, part.count)) for part in parts)
        assert stored <= experts.layout(expert).read_bytes < stored + ALIGNMENT * max(pieces, 1)


def test_the_experts_between_an_expert_s_two_weights_are_not_read() -> None:
    """gate_up of all experts, then down of all experts: between the two parts of one lies everybody else's."""
    disk = Checkpoint()
    up, down = (disk.weights[disk.add(name, 4, 8, 256, cut=Cut.EXPERTS)] for name in ("up", "down"))
    assert up.stored_nbytes // 4 == ALIGNMENT and up.stored_nbytes < 64 * 1024, "a hole that a dense unit would read"
    experts = Experts("m", (up, down), 4, 2)
    for expert in range(4):
        layout = experts.layout(expert)
        assert len(layout.reads) == 2 and layout.read_bytes == 2 * ALIGNMENT
        check_bytes(layout, disk)


def test_neighbours_of_one_expert_are_one_read() -> None:
    disk = Checkpoint()
    names = [disk.add(f"{name}{i}", 1, 8, 256, cut=Cut.EXPERTS) for i in range(3) for name in ("up", "down")]
    experts = Experts("m", tuple(disk.weights[name] for name in names[2:4]), 1, 1)
    (read,) = experts.layout(0).reads
    assert read.needed == 2 * ALIGNMENT and read.aligned


def test_sizes_of_experts() -> None:
    disk = Checkpoint()
    up, small = disk.add("up", 4, 8, 256, cut=Cut.EXPERTS), disk.add("small", 2 * 16, 3, cut=Cut.EXPERTS, experts=2)
    experts = Experts("m", (disk.weights[up], disk.weights[small]), 4, 3)
    assert experts.stored_bytes == 4 * 8 * 256 * 2 + 2 * 16 * 3 * 2
    assert experts.routed_bytes == 3 * (8 * 256 * 2 + 16 * 3 * 2)
    other = dataclasses.replace(experts, weights=experts.weights[:1])
    assert slot_bytes([experts, other]) == experts.slot_bytes > other.slot_bytes
    assert slot_bytes([]) == 0


# -- which weights are experts


def one_layer(routed: int = 0) -> tuple[Schedule, Checkpoint]:
    disk = Checkpoint()
    up, down = disk.add("up", 4, 8, 16, cut=Cut.EXPERTS), disk.add("down", 4, 8, 16, cut=Cut.EXPERTS)
    layer = Call("layer", (), (Call("layer.experts", (up, down, up)), Call("layer.experts", (up,))))
    return Schedule(Call("", (), (layer,)), disk.weights, frozenset({"layer"}), routed={"layer.experts": routed}), disk


@pytest.mark.parametrize(("said", "routed"), [(0, 4), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_a_module_s_experts_are_routed_to_as_the_trace_says_or_all_of_them(said: int, routed: int) -> None:
    schedule, disk = one_layer(said)
    (found,) = experts_of(schedule, disk.weights.values())
    assert (found.module, [w.name for w in found.weights]) == ("layer.experts", ["up", "down"])
    assert (found.count, found.routed) == (4, routed)


def test_a_weight_of_two_modules_or_one_that_is_computed_is_dense() -> None:
    schedule, disk = one_layer()
    other = Call("other", ("up",))
    shared = dataclasses.replace(schedule, root=Call("", (), (*schedule.root.calls, other)))
    (found,) = experts_of(shared, disk.weights.values())
    assert [w.name for w in found.weights] == ["down"]
    weights = {n: dataclasses.replace(w, convert=Convert.REPLAY) for n, w in disk.weights.items()}
    assert experts_of(schedule, weights.values()) == ()
    assert experts_of(schedule, [dataclasses.replace(w, cut=Cut.WHOLE) for w in disk.weights.values()]) == ()
    assert experts_of(schedule, []) == ()


def test_what_is_not_read_on_demand_streams() -> None:
    schedule, disk = one_layer(2)
    big = [disk.add(f"big{i}", 4, 64, 512, cut=Cut.EXPERTS) for i in range(5)]
    calls = tuple(Call(f"{caller}{i}", (name,)) for i, name in enumerate(big) for caller in "ab")
    layers = frozenset(call.module for call in calls) | {"layer"}
    schedule = dataclasses.replace(schedule, root=Call("", (), (*schedule.root.calls, *calls)), layers=layers)
    plan = make_plan(schedule, Budget(minimum_memory(schedule, Budget(0))[0]))
    check_plan(schedule, plan)
    assert [module.module for module in plan.experts] == ["layer.experts"]
    assert [plan.items[step].module for step in plan.steps] == [call.module for call in calls]


# -- the division


@st.composite
def sizes(draw: st.DrawFn) -> tuple[tuple[Experts, ...], int, int, int]:
    """Modules, dense bytes, their window, and a room that holds the window and a slot."""
    modules = []
    for i in range(draw(st.integers(1, 4))):
        disk, count = Checkpoint(), draw(st.integers(1, 24))
        weight = disk.weights[disk.add(f"w{i}", count, draw(st.sampled_from((1, 900, 4096, 40_000, 30 << 20))),
                                       cut=Cut.EXPERTS)]  # fmt: skip
        modules.append(Experts(f"m{i}", (weight,), count, draw(st.integers(1, count))))
    slot = slot_bytes(modules)
    dense = draw(st.integers(0, 60)) * slot // 4 + draw(st.integers(0, 5000))
    window = draw(st.integers(0, dense))
    return tuple(modules), dense, window, window + slot + draw(st.integers(0, 120 * slot))


@settings(max_examples=300, deadline=None)
@given(sizes())
def test_a_division_stays_in_its_room(given_sizes: tuple[tuple[Experts, ...], int, int, int]) -> None:
    experts, dense, window, room = given_sizes
    division, total = divide(experts, dense, window, room), sum(module.count for module in experts)
    assert 1 <= division.slots <= total
    assert division.dense_bytes + division.slots * slot_bytes(experts) <= room
    assert division.dense_bytes >= window
    if room >= dense + total * slot_bytes(experts):
        assert division.slots == total


@settings(max_examples=300, deadline=None)
@given(sizes(), st.integers(0, 1 << 31))
def test_more_room_is_never_fewer_slots(given_sizes: tuple[tuple[Experts, ...], int, int, int], more: int) -> None:
    experts, dense, window, room = given_sizes
    assert divide(experts, dense, window, room + more).slots >= divide(experts, dense, window, room).slots


@settings(max_examples=300, deadline=None)
@given(sizes())
def test_no_other_division_is_expected_to_read_less(given_sizes: tuple[tuple[Experts, ...], int, int, int]) -> None:
    """But for the experts that must be in memory at once, which have up to a quarter of the room, and for what is
    left over where one slot more would not fit."""
    experts, dense, window, room = given_sizes
    slot, total = slot_bytes(experts), sum(module.count for module in experts)

    def read(slots: int) -> float:
        kept = min(dense, room - slots * slot)
        return dense - kept + sum(module.routed_bytes for module in experts) * (1 - slots / total)

    chosen = divide(experts, dense, window, room).slots
    over = max(room - chosen * slot - dense, 0)
    assert over < slot or chosen == total
    possible = [slots for slots in range(1, total + 1) if slots * slot <= room]
    assert all(read(chosen) <= read(slots) + over + 1e-3 for slots in possible if slots > chosen)
    if any(read(slots) < read(chosen) - 1e-3 for slots in possible if slots < chosen):
        at_once = max(max(module.routed for module in experts) + 1, IN_FLIGHT // slot)
        assert chosen <= max(1, min(at_once, room // 4 // slot))


def test_no_experts_are_no_slots() -> None:
    assert (divide([], 100, 50, 80).slots, divide([], 100, 50, 80).dense_bytes) == (0, 80)


# -- whole models

# layers, hidden, an expert's inner size, experts of a layer, vocabulary, experts of a token
SHAPES = {
    "mixtral-8x7b": (32, 4096, 14336, 8, 32000, 2),
    "qwen3-235b": (94, 4096, 1536, 128, 151936, 8),
    "deepseek-v3": (58, 7168, 2048, 256, 129280, 8),
}


def of_shape(name: str) -> Schedule:
    *shape, routed = SHAPES[name]
    return mixture(*shape, routed=routed)[0]


@pytest.fixture(scope="module", params=SHAPES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return of_shape(request.param)


@pytest.fixture
def no_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is made without looking at a single expert."""

    def look(self: Experts, expert: int) -> None:
        raise AssertionError("the layout of an expert, in a plan")

    monkeypatch.setattr(Experts, "layout", look)


@pytest.mark.usefixtures("no_layouts")
def test_more_memory_never_reads_more_and_the_promise_is_kept(schedule: Schedule) -> None:
    least, _ = minimum_memory(schedule, Budget(0))
    whole = resident_size(schedule.weights.values())
    budgets = [least + int((whole - least) * (i / 12) ** 3) for i in range(13)]
    plans = [make_plan(schedule, Budget(memory)) for memory in budgets]
    for plan in plans:
        check_plan(schedule, plan)
        assert plan.bytes_read_per_pass == plan.bytes_streamed_per_pass + plan.expert_bytes_per_token
    read = [plan.bytes_read_per_pass for plan in plans]
    assert all(more <= less for less, more in itertools.pairwise(read)), [round(r / GB, 2) for r in read]
    assert plans[0].expert_slots == 1 and plans[0].steps
    assert read[-1] == 0 and not plans[-1].streams


@pytest.mark.usefixtures("no_layouts")
def test_the_least_memory_is_enough_and_a_byte_less_is_not(schedule: Schedule) -> None:
    budget = Budget(0, overhead_bytes=GB // 2, activation_bytes=GB // 10, kv_cache_bytes=GB // 5, context_tokens=4096)
    least, _ = minimum_memory(schedule, budget)
    assert GB // 2 < least < 2 * GB
    check_plan(schedule, make_plan(schedule, dataclasses.replace(budget, memory_bytes=least)))
    with pytest.raises(BudgetError) as caught:
        make_plan(schedule, dataclasses.replace(budget, memory_bytes=least - 1))
    assert caught.value.minimum_bytes == least


@pytest.mark.usefixtures("no_layouts")
def test_dense_weights_come_first_and_the_cache_has_the_rest(schedule: Schedule) -> None:
    """Memory that is given is used, and where dense weights stream the experts have but their least share."""
    routed = {w.name for w in schedule.weights.values() if w.cut is Cut.EXPERTS}
    always = {w.name for w in schedule.weights.values() if w.always}
    looked_up = {w.name for w in schedule.weights.values() if w.gathered}
    whole = resident_size(schedule.weights.values())
    streamed = 0
    for share in (0.01, 0.02, 0.05, 0.2, 0.6):
        plan = make_plan(schedule, Budget(int(whole * share)))
        used = resident_size(schedule.weights[name] for name in plan.resident) + plan.ring_bytes
        used += plan.expert_cache_bytes + KNOWN * sum(module.count for module in plan.experts)
        assert 0 <= plan.budget.memory_bytes - used < plan.expert_slot_bytes + GB // 10
        if plan.steps:
            streamed += 1
            assert plan.expert_cache_bytes <= max(0.3 * plan.budget.memory_bytes, plan.expert_slot_bytes)
        else:
            assert plan.resident == schedule.weights.keys() - routed - looked_up and plan.resident >= always
    assert 0 < streamed < 5


def test_a_plan_of_the_largest_model_is_pure() -> None:
    schedule = of_shape("deepseek-v3")
    budget = Budget(24 * GB)
    plan = make_plan(schedule, budget)
    assert make_plan(schedule, budget) == plan
    assert plan == make_plan(of_shape("deepseek-v3"), budget)
    assert sum(module.count for module in plan.experts) == 58 * 256
    assert len(plan.experts) == 58 and all(len(module.weights) == 2 for module in plan.experts)


@pytest.mark.usefixtures("no_layouts")
def test_both_budgets_are_kept_where_a_device_computes(schedule: Schedule) -> None:
    for memory, device in itertools.product((1, 8, 2000), (2, 24, 640)):
        try:
            plan = make_plan(schedule, Budget(memory * GB, device_memory_bytes=device * GB))
        except BudgetError:
            assert memory == 1
            continue
        check_plan(schedule, plan)
        if not plan.steps and plan.experts:
            assert plan.ring_bytes == plan.device_ring_bytes == 0


def test_a_token_s_bytes(schedule: Schedule) -> None:
    plan = make_plan(schedule, Budget(30 * GB))
    experts = [w for w in schedule.weights.values() if w.cut is Cut.EXPERTS]
    dense = sum(w.stored_nbytes for w in schedule.weights.values() if w.cut is not Cut.EXPERTS and not w.gathered)
    routed = next(iter(schedule.routed.values()))
    of_a_token = sum(w.stored_nbytes for w in experts) * routed // experts[0].experts
    assert plan.active_bytes_per_token == dense + of_a_token
    total = sum(module.count for module in plan.experts)
    assert abs(plan.expert_bytes_per_token - of_a_token * (total - plan.expert_slots) / total) <= 1
    said = plan.as_dict()
    assert said["expert_bytes"] == sum(w.stored_nbytes for w in experts)
    assert said["experts"] == total == len(plan.experts) * experts[0].experts
    assert said["expert_cache_bytes"] == plan.expert_slots * plan.expert_slot_bytes


def test_where_the_trace_cannot_tell_every_expert_is_expected() -> None:
    told, untold = (mixture(4, 512, 1024, 8, routed=routed)[0] for routed in (2, 0))
    budget = Budget(20_000_000)
    few, all_of_them = make_plan(told, budget), make_plan(untold, budget)
    assert all_of_them.active_bytes_per_token == sum(w.stored_nbytes for w in untold.weights.values() if not w.gathered)
    assert few.active_bytes_per_token < all_of_them.active_bytes_per_token
    assert all_of_them.expert_bytes_per_token == 4 * few.expert_bytes_per_token > 0


@example(seed=362880, share=0.96875)  # nothing is left to choose, and no room
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), share=st.floats(0, 1))
def test_what_a_running_model_has_is_all_that_stays(seed: int, share: float) -> None:
    """A longer context takes room: nothing becomes resident that was not, whatever is experts stays so."""
    schedule, _ = random_schedule(seed, scale=random.Random(seed).choice((4096, 300_000)))
    least, _ = minimum_memory(schedule, Budget(0))
    whole = resident_size(schedule.weights.values())
    memory = least + int(share * max(whole - least, 0))
    before = make_plan(schedule, Budget(memory))
    grown = make_plan(schedule, Budget(memory, kv_cache_bytes=(memory - least) // 2), keep=before.resident)
    check_plan(schedule, grown)
    assert grown.resident <= before.resident


def test_a_host_that_could_hold_the_dense_weights_never_reads_them() -> None:
    schedule = of_shape("qwen3-235b")
    plan = make_plan(schedule, Budget(32 * GB, device_memory_bytes=8 * GB))
    check_plan(schedule, plan)
    passing = sum(plan.items[step].nbytes for step in plan.steps)
    assert passing > 4 * GB and plan.bytes_streamed_per_pass < 0.01 * passing


def test_what_the_device_holds_is_not_expected_to_be_read() -> None:
    schedule = of_shape("qwen3-235b")
    few, many = (make_plan(schedule, Budget(32 * GB, device_memory_bytes=d * GB)) for d in (40, 400))
    assert few.device_expert_slots < many.device_expert_slots
    assert many.bytes_read_per_pass < few.bytes_read_per_pass
