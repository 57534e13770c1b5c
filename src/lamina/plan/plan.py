"""What was decided, as frozen data: the budget of a request, and the plan that keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from lamina.plan.expert_slots import Experts
from lamina.plan.forecast import READ_OPERATIONS, Hardware, Work, seconds_per_token
from lamina.plan.layout import Item
from lamina.sizes import format_size

LAYERS_THERE = 4  # of a cache in host memory: the one in use, old and grown, the one that leaves, the one that comes
SHORTEST_CONTEXT = 256  # tokens, where the user gives no number and the memory is short


PLAIN_WINDOW = 192e6  # of the plan that is not made, where nothing would be packed


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be used and bytes that are reserved.

    Attributes:
        memory_bytes: peak resident memory of the process.
        overhead_bytes: Python, torch, buffers: what is there with any model.
        already_held_bytes: what the process holds besides, for other libraries or data; none in a fresh one.
        activation_bytes: the largest set of activations alive at once, for `context_tokens`.
        kv_cache_bytes: the cache after `context_tokens`.
        context_tokens: prompt and answer together.
        scratch_bytes: what unpacking weights takes beside them.
        draft_bytes: of a draft that proposes tokens: its weights, its cache, and what verifying many tokens takes.
        override_bytes: of weights that were written to, which stay in memory from then on.
        device_memory_bytes: of the accelerator, all that the process has there; None where the processor computes.
        device_overhead_bytes: of it, what the driver and its libraries have, beside every tensor.
        chunk_tokens: a prompt is taken in chunks of so many tokens, so that activations stay small; 0: whole.
        cache_layers: layers whose keys and values wait in host memory for their turn; 0: all are on the device.
        host_cache_bytes: of that cache; `kv_cache_bytes` is then what a few layers of it have on the device.
    """

    memory_bytes: int
    overhead_bytes: int = 0
    activation_bytes: int = 0
    kv_cache_bytes: int = 0
    context_tokens: int = 0
    device_memory_bytes: int | None = None
    scratch_bytes: int = 0
    draft_bytes: int = 0
    override_bytes: int = 0
    already_held_bytes: int = 0
    device_overhead_bytes: int = 0
    chunk_tokens: int = 0
    cache_layers: int = 0
    host_cache_bytes: int = 0

    @property
    def on_device(self) -> bool:
        """Whether an accelerator computes."""
        return self.device_memory_bytes is not None

    @property
    def reserved_bytes(self) -> int:
        """Bytes of `memory_bytes` that no weight may have."""
        return self.of_the_process + self.host_cache_bytes + (0 if self.on_device else self.reserved_bytes_on_device)

    def with_cache(self, nbytes: int) -> Budget:
        """The same with a key-value cache of so many bytes, where this one has its."""
        if not self.cache_layers:
            return replace(self, kv_cache_bytes=nbytes)
        there = -(-nbytes // self.cache_layers) * min(LAYERS_THERE, self.cache_layers)
        return replace(self, kv_cache_bytes=there, host_cache_bytes=nbytes)

    def has_cache(self, nbytes: int, activations: int) -> bool:
        """Whether there is room for a cache and activations of so many bytes."""
        wanted = self.with_cache(nbytes)
        if wanted.host_cache_bytes > self.host_cache_bytes:
            return False
        return wanted.kv_cache_bytes + activations <= self.kv_cache_bytes + self.activation_bytes

    @property
    def of_the_process(self) -> int:
        """Bytes that are taken with any model."""
        return self.overhead_bytes + self.already_held_bytes

    @property
    def reserved_bytes_on_device(self) -> int:
        """Bytes that computing takes where it is done, and that no weight may have there."""
        working = self.activation_bytes + self.kv_cache_bytes + self.scratch_bytes
        return working + self.draft_bytes + self.override_bytes + self.device_overhead_bytes


@dataclass(frozen=True)
class Plan:
    """What lives where. Frozen; the stream executes it, the command line prints it.

    Attributes:
        resident: weights that stay where they are computed on.
        gathered: weights of which rows are read when they are looked up.
        items: everything that is streamed; `steps` are indices into it, in the order of a pass.
        branches: steps as well, for each part of the model that other passes than those over text alone go through.
        ring_bytes: the window on the host; `device_ring_bytes` the one on the device.
        minimum_memory_bytes: the smallest budget that holds this model with this context.
        active_bytes_per_token: of the weights that one token needs; less than `model_bytes` where it is routed.
        encoded_bytes_per_token: of these, what is unpacked where it is used; `decoded_bytes_per_token` once unpacked.
        operations_per_token: what the calls of a pass cost, in small operations of torch.
        expert_count: experts of the model, wherever they are; `expert_bytes` is what they have on disk.
        experts: those that are read when they are routed to; empty where all of them are resident.
        expert_slots: how many of them the cache in memory holds, each in `expert_slot_bytes`.
        device_expert_slots: how many the cache on the device holds.
        fallbacks: second ways that are taken, each with its reason.
    """

    budget: Budget
    hardware: Hardware
    model_bytes: int
    parameters: int
    resident: frozenset[str]
    gathered: frozenset[str]
    items: tuple[Item, ...]
    steps: tuple[int, ...]
    resident_bytes: int
    ring_bytes: int
    minimum_memory_bytes: int
    device_ring_bytes: int = 0
    minimum_device_memory_bytes: int = 0
    traced: bool = True
    active_bytes_per_token: int = 0
    encoded_bytes_per_token: int = 0
    decoded_bytes_per_token: int = 0
    operations_per_token: int = 0
    expert_count: int = 0
    expert_bytes: int = 0
    experts: tuple[Experts, ...] = ()
    expert_slots: int = 0
    expert_slot_bytes: int = 0
    device_expert_slots: int = 0
    fallbacks: tuple[str, ...] = ()
    branches: tuple[tuple[int, ...], ...] = ()

    def __repr__(self) -> str:
        """What matters, in a few lines; `as_dict` has all of it."""
        budget = self.budget
        memory = format_size(budget.memory_bytes)
        if budget.device_memory_bytes is not None:
            memory += f" and {format_size(budget.device_memory_bytes)} on the device"
        least, context = format_size(self.minimum_memory_bytes), budget.context_tokens
        lines = [
            f"Plan: memory budget {memory}, at least {least} for a context of {context} tokens",
            f"  weights: {format_size(self.model_bytes)}, of which {format_size(self.resident_bytes)} are resident",
        ]
        if self.streams:
            read, window = format_size(self.bytes_read_per_pass), format_size(self.ring_bytes)
            lines.append(f"  streamed: {read} in each pass, {self.units} units through a ring of {window}")
        if self.experts:
            kept = f"{self.expert_slots:,} of {self.expert_count:,} in {format_size(self.expert_cache_bytes)}"
            lines.append(f"  experts: read when they are routed to, {kept} kept")
        lines.append(f"  expected: {self._expected}")
        return "\n".join([*lines, *(f"  fallback: {each}" for each in self.fallbacks)])

    @property
    def _expected(self) -> str:
        return f"{self.predicted_seconds_per_token:.2g} s a token"

    @property
    def streams(self) -> bool:
        """Whether anything is read while the model runs."""
        return bool(self.steps or self.experts or self.branches)

    @cached_property
    def bytes_streamed_per_pass(self) -> int:
        """Bytes that every pass reads, for any tokens."""
        return sum(self.items[i].layout.read_bytes for i in self.steps if not self.items[i].cached)

    @cached_property
    def expert_bytes_per_token(self) -> int:
        """Bytes of experts that a token makes the disk give, if all are as likely and the cache is full."""
        total = sum(module.count for module in self.experts)
        held = min(self.expert_slots + self.device_expert_slots, total)
        missing = 1 - held / total if total else 0.0
        return round(sum(module.routed_bytes for module in self.experts) * missing)

    @property
    def bytes_read_per_pass(self) -> int:
        """Bytes that a decode step of one token reads: what streams, and the experts that are expected to miss."""
        return self.bytes_streamed_per_pass + self.expert_bytes_per_token

    @property
    def hit_rate_without_reading(self) -> float | None:
        """1 where every expert is resident, None where there is none or nothing was routed yet."""
        return 1.0 if self.expert_count and not self.experts else None

    @property
    def expert_cache_bytes(self) -> int:
        """Bytes of host memory for the experts that are kept."""
        return self.expert_slots * self.expert_slot_bytes

    def has_room_for(self, budget: Budget) -> bool:
        """Whether another budget is kept by the same plan."""
        if budget.device_memory_bytes is None:
            held = self.resident_bytes + self.ring_bytes + self.expert_cache_bytes
            return budget.reserved_bytes + held <= budget.memory_bytes
        held = self.resident_bytes + self.device_ring_bytes + self.device_expert_slots * self.expert_slot_bytes
        return budget.reserved_bytes_on_device + held <= budget.device_memory_bytes

    @property
    def units(self) -> int:
        """Units moved in a pass."""
        return len(self.steps)

    @property
    def work(self) -> Work:
        """What a decode step has to move and to compute, as far as the plan can tell."""
        return Work(
            streamed_bytes=self.bytes_streamed_per_pass,
            expert_bytes=self.expert_bytes_per_token,
            linked_bytes=sum(self.items[i].nbytes for i in self.steps) if self.budget.on_device else 0,
            plain_bytes=self.active_bytes_per_token - self.encoded_bytes_per_token,
            unpacked_bytes=self.decoded_bytes_per_token,
            operations=self.operations_per_token + READ_OPERATIONS * len(self.steps),
            window_bytes=self.device_ring_bytes or self.ring_bytes,
        )

    @property
    def predicted_seconds_per_token(self) -> float:
        """See `lamina.plan.forecast`."""
        return seconds_per_token(self.work, self.hardware)

    @property
    def predicted_seconds_per_token_plain(self) -> float | None:
        """The same if no weight were packed; None where none is, or where it is read only when routed to."""
        if not self.encoded_bytes_per_token or self.experts:
            return None
        needed = self.active_bytes_per_token - self.encoded_bytes_per_token + self.decoded_bytes_per_token
        streamed = max(needed - self.resident_bytes, 0)
        work = replace(
            self.work, streamed_bytes=streamed, plain_bytes=needed, unpacked_bytes=0, window_bytes=PLAIN_WINDOW
        )
        return seconds_per_token(work, self.hardware)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers."""
        budget = asdict(self.budget)
        budget["memory_budget_bytes"] = budget.pop("memory_bytes")
        budget["device_memory_budget_bytes"] = budget.pop("device_memory_bytes")
        return {
            "model_bytes": self.model_bytes,
            "parameters": self.parameters,
            "resident_bytes": self.resident_bytes,
            "bytes_read_per_pass": self.bytes_read_per_pass,
            "active_bytes_per_token": self.active_bytes_per_token,
            "expert_bytes": self.expert_bytes,
            "expert_bytes_per_token": self.expert_bytes_per_token,
            "expert_cache_bytes": self.expert_cache_bytes,
            "expert_slots": self.expert_slots,
            "experts": self.expert_count,
            "ring_bytes": self.ring_bytes,
            "device_ring_bytes": self.device_ring_bytes,
            "minimum_memory_bytes": self.minimum_memory_bytes,
            "minimum_device_memory_bytes": self.minimum_device_memory_bytes,
            "predicted_seconds_per_token": self.predicted_seconds_per_token,
            "predicted_seconds_per_token_plain": self.predicted_seconds_per_token_plain,
            "units": self.units,
            "gathered": sorted(self.gathered),
            "traced": self.traced,
            "fallbacks": list(self.fallbacks),
            **budget,
            **asdict(self.hardware),
        }
