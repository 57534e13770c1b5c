"""Which draft is chosen and what it may cost: by forecasts alone, nothing is read."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from helpers.schedules import llama, mixture
from lamina.errors import RequestError
from lamina.plan.forecast import Hardware
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan
from lamina.plan.schedule import Schedule
from lamina.plan.speculation import Drafted, Session, drafted_seconds, pays, seconds_with_draft
from lamina.speculative.decoder import MOST, draft_model_bytes, draft_name, row_seconds, verifying_bytes

GB = 10**9
COPY = 42 * GB // 10  # of the model below, in 4 bits


@cache
def eight() -> Schedule:
    """A Llama of 8 billion weights, 16 GB."""
    return llama(32, 4096, 14336, 1024, 128256)[0]


def planned(memory: float, draft: int = 0, schedule: Schedule | None = None, **rates: float) -> Plan:
    """With so many GB, `draft` bytes of them for a draft."""
    hardware = Hardware(**{"disk_bytes_per_second": 1e9, "memory_bytes_per_second": 2e10, **rates})
    return make_plan(schedule or eight(), Budget(int(memory * GB), draft_bytes=draft), hardware)


def worth(memory: float, **rates: float) -> tuple[bool, str]:
    return pays(planned(memory, **rates), planned(memory, COPY, **rates), COPY)


# -- whether a copy is worth its memory


@pytest.mark.parametrize("memory", [6.5, 8, 12])
def test_a_copy_pays_where_a_drive_is_waited_for(memory: float) -> None:
    paying, reason = worth(memory)
    assert paying
    assert "the copy in 4 bits takes 4.20 GB" in reason
    assert "times as fast by forecast" in reason


def test_a_copy_pays_no_more_where_the_model_only_just_fits_without() -> None:
    """At a tenth of a second a token without a draft, nothing is read for the sake of one."""
    slow = {"disk_bytes_per_second": 1e8, "memory_bytes_per_second": 2e11}
    assert not planned(17, **slow).streams
    assert planned(17, COPY, **slow).streams
    paying, reason = worth(17, **slow)
    assert not paying
    assert "0.0 times as fast" in reason


def test_a_copy_pays_the_more_the_slower_the_drive() -> None:
    """By the figures that are told."""
    told = [float(worth(8, disk_bytes_per_second=rate)[1].split(": ")[1].split(" ")[0]) for rate in (4e9, 1e9, 2e8)]
    assert told == sorted(told)
    assert told[0] < told[-1]


def test_a_copy_that_is_as_slow_as_the_model_does_not_pay() -> None:
    dear = {"operation_seconds": 5e-3}  # of which a copy has as many
    assert not worth(17 + COPY / GB, **dear)[0]
    assert worth(17 + COPY / GB)[0]


def test_what_is_read_for_the_copys_sake_is_told() -> None:
    without, with_copy = planned(12), planned(12, COPY)
    more = (with_copy.bytes_read_per_pass - without.bytes_read_per_pass) / GB
    assert 3.5 < more < 5
    assert f"so {more:.1f}" in pays(without, with_copy, COPY)[1]


def test_clearly_better_is_asked_for() -> None:
    """A forecast that is a tenth better may be no better at all."""
    plan = planned(8)
    plain = plan.predicted_seconds_per_token
    nbytes = next(
        n for n in range(0, 100 * GB, GB // 10)
        if seconds_with_draft(plan, n, plan.operations_per_token) > plain / 1.15
    )  # fmt: skip
    assert not pays(plan, plan, nbytes)[0]
    assert pays(plan, plan, nbytes // 2)[0]


def test_the_seconds_of_a_drafted_token() -> None:
    hardware = Hardware(memory_bytes_per_second=2e10, operation_seconds=1e-5)
    assert drafted_seconds(4 * GB, 1000, hardware) == pytest.approx(0.2 + 0.01)


def test_with_a_draft_a_pass_gives_several_tokens() -> None:
    plan = planned(8)
    assert seconds_with_draft(plan, 0, 0) < plan.predicted_seconds_per_token / 4
    assert seconds_with_draft(plan, 2 * COPY, 0) > seconds_with_draft(plan, COPY, 0)


# -- what a row more costs


def test_rows_are_free_while_the_drive_is_waited_for() -> None:
    assert row_seconds(planned(3), exact=False) == 0.0


def test_rows_cost_products_where_all_is_in_memory() -> None:
    plan = planned(40)
    assert not plan.streams
    row, exact = row_seconds(plan, exact=False), row_seconds(plan, exact=True)
    assert 0 < row < 0.1 * plan.predicted_seconds_per_token
    assert row < exact < plan.predicted_seconds_per_token


def test_rows_cost_experts_of_their_own() -> None:
    schedule, _ = mixture(8, 1024, 2048, 64)
    streams = planned(1.0, schedule=schedule)
    assert streams.expert_bytes_per_token > 0
    # near a whole pass: what is read for a token is mostly its own experts
    assert row_seconds(streams, False) > 0.4 * streams.predicted_seconds_per_token
    kept = planned(40, schedule=schedule)
    assert row_seconds(kept, False) > 0.3 * kept.predicted_seconds_per_token


# -- the memory of a draft


def test_verifying_takes_logits_for_all_rows() -> None:
    assert verifying_bytes(LlamaConfig(vocab_size=1000)) == (MOST + 1) * 1000 * 6
    assert verifying_bytes(SimpleNamespace()) == 0


def draft_model() -> Any:
    return SimpleNamespace(
        nbytes=100, scratch_bytes=10, cache_bytes=lambda tokens: 2 * tokens, activation_bytes=lambda tokens: 5 * tokens
    )


def test_a_copy_takes_its_weights_alone() -> None:
    assert draft_model_bytes(draft_model(), "self", 1000, 0) == 110


def test_another_model_has_a_cache_and_its_share_of_activations() -> None:
    assert draft_model_bytes(draft_model(), "other", 7, 0) == 110 + 14 + 35
    assert draft_model_bytes(draft_model(), "other", 7, 30) == 110 + 14 + 5  # the two never run at once
    assert draft_model_bytes(draft_model(), "other", 7, 99) == 110 + 14


def test_a_drafts_bytes_are_reserved_and_said() -> None:
    without, with_copy = planned(8), planned(8, COPY)
    assert with_copy.budget.reserved_bytes == without.budget.reserved_bytes + COPY
    assert with_copy.as_dict()["draft_bytes"] == COPY
    assert with_copy.minimum_memory_bytes == without.minimum_memory_bytes + COPY
    assert with_copy.resident_bytes < without.resident_bytes


def test_a_session_is_its_plan_with_the_draft_beside_it() -> None:
    plan, drafted = planned(8), Drafted(draft="self", draft_reason="asked for", predicted_seconds_per_token_drafted=0.5)
    session = Session.of(plan, drafted)
    assert not hasattr(plan, "draft")
    assert isinstance(session, Plan) and session.resident == plan.resident
    assert session.predicted_seconds_per_token == plan.predicted_seconds_per_token
    assert session.as_dict() == plan.as_dict() | {
        "draft": "self",
        "draft_reason": "asked for",
        "predicted_seconds_per_token_drafted": 0.5,
    }
    assert repr(session).replace(", draft self (asked for)", "") == repr(plan)
    assert repr(Session.of(plan, Drafted())) == repr(plan)


# -- the name of a draft


def test_names_of_drafts() -> None:
    assert draft_name(None) == "none"
    for name in ("none", "auto", "self", "lookup", "Qwen/Qwen3-0.6B"):
        assert draft_name(name) == name


@pytest.mark.parametrize("draft", [3, True, False, "", 1.5, b"self", ["self"]])
def test_what_is_no_name_of_a_draft(draft: Any) -> None:
    with pytest.raises(RequestError, match="give 'none', 'auto', 'lookup', 'self', or a model"):
        draft_name(draft)
