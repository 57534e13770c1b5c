"""A plan with its draft, and whether a draft is worth the memory that it takes from the weights. Pure functions.

A draft's bytes could keep weights resident instead, which every pass would then not have to read. Against that a pass
with a draft gives several tokens. With T the pass of one token, T' the longer one beside the draft, and d the time of a
drafted token and of its row in the pass, it pays where (T' + `DRAFTED` d) / `GIVEN` is less than T.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lamina.plan.forecast import Hardware
from lamina.plan.plan import Plan
from lamina.sizes import format_size

NONE = "none"  # the draft of a model that nothing proposes tokens to
DRAFTED, GIVEN = 12, 8  # tokens of a cycle of a copy in 4 bits: fewer than were measured (docs/speculation.md)
CLEARLY = 1.2  # times quicker: a forecast may be off by that


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """What proposes tokens to a model.

    Attributes:
        draft: as it is asked for; "none" where nothing does.
        draft_reason: why this.
        predicted_seconds_per_token_drafted: with a copy of the model in 4 bits; None for other drafts, of which it
            depends on the text.
    """

    draft: str = NONE
    draft_reason: str = ""
    predicted_seconds_per_token_drafted: float | None = None


@dataclass(frozen=True, repr=False)
class Session(Plan, Drafted):
    """A plan, and the draft beside it: what a user is shown."""

    @classmethod
    def of(cls, plan: Plan, drafted: Drafted) -> Session:
        """A plan with its draft."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(Plan)}, **asdict(drafted))

    @property
    def _expected(self) -> str:
        drafted = f", draft {self.draft} ({self.draft_reason})" if self.draft != NONE else ""
        return f"{super()._expected}{drafted}"

    def as_dict(self) -> dict[str, Any]:
        """The plan and its draft as plain numbers, for `lamina plan --json`."""
        return {**super().as_dict(), **{field.name: getattr(self, field.name) for field in fields(Drafted)}}


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


def pays(without: Plan, with_copy: Plan, nbytes: int, row: float = 0.0) -> tuple[bool, str]:
    """Whether a copy in 4 bits is worth its memory, and why.

    Args:
        without: the plan that has all the memory.
        with_copy: the plan that leaves room for the copy.
        nbytes: of the copy.
        row: as for `seconds_with_draft`.
    """
    plain = without.predicted_seconds_per_token
    drafted = seconds_with_draft(with_copy, nbytes, without.operations_per_token, row)
    read = with_copy.bytes_read_per_pass - without.bytes_read_per_pass
    figures = (
        f"the copy in 4 bits takes {format_size(nbytes)}, so {format_size(max(read, 0))} more are read for each pass: "
        f"{plain / drafted:.1f} times as fast by forecast"
    )
    return drafted * CLEARLY < plain, figures
