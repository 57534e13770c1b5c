"""Whether a draft is worth the memory that it takes from the weights. Pure functions.

A draft's bytes could keep weights resident instead, which every pass would then not have to read. Against that a pass
with a draft gives several tokens. With T the pass of one token, T' the longer one beside the draft, and d the time of a
drafted token and of its row in the pass, it pays where (T' + `DRAFTED` d) / `GIVEN` is less than T.
"""

from __future__ import annotations

from lamina.plan.forecast import Hardware
from lamina.plan.plan import Plan
from lamina.sizes import format_size

DRAFTED, GIVEN = 12, 8  # tokens of a cycle of a copy in 4 bits: fewer than were measured (docs/speculation.md)
CLEARLY = 1.2  # times quicker: a forecast may be off by that


def drafted_seconds(nbytes: int, operations: int, hardware: Hardware) -> float:
    """How long a draft takes for a token: its weights through memory once, and its operations."""
    return nbytes / hardware.memory_bytes_per_second + operations * hardware.operation_seconds


def seconds_with_draft(plan: Plan, nbytes: int, operations: int, row: float = 0.0) -> float:
    """Seconds of a token where a copy in 4 bits drafts.

    Args:
        plan: with room for the draft.
        nbytes: of the draft's weights.
        operations: of a token of the draft.
        row: seconds that each more token adds to a pass.
    """
    one = drafted_seconds(nbytes, operations, plan.hardware) + row
    return (plan.predicted_seconds_per_token + DRAFTED * one) / GIVEN


def pays(without: Plan, beside: Plan, nbytes: int, row: float = 0.0) -> tuple[bool, str]:
    """Whether a copy in 4 bits is worth its memory, and why.

    Args:
        without: the plan that has all the memory.
        beside: the plan that leaves room for the copy.
        nbytes: of the copy.
        row: as for `seconds_with_draft`.
    """
    plain = without.predicted_seconds_per_token
    drafted = seconds_with_draft(beside, nbytes, without.operations_per_token, row)
    read = beside.bytes_read_per_pass - without.bytes_read_per_pass
    figures = (
        f"the copy in 4 bits takes {format_size(nbytes)}, so {format_size(max(read, 0))} more are read for each pass: "
        f"{plain / drafted:.1f} times as fast by forecast"
    )
    return drafted * CLEARLY < plain, figures
