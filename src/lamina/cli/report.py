"""Records of the library as people read them: one-line summaries and two-column tables, or one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lamina.cli.live import StatusLine
from lamina.sizes import format_rate, format_size

SHOWN_POSITIONS = 16  # of a draft, in a table


def as_json(record: Mapping[str, Any]) -> str:
    """One JSON object on one line. What JSON has no number for (no pass yet, no disk read) is null."""
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def summary(stats: Mapping[str, Any], tokens: int) -> str:
    """What an answer took, in one line. Numbers that were not measured are left out."""
    count = f"{tokens} token" + ("" if tokens == 1 else "s")
    return " · ".join([count, *(part for parts in _SUMMARY for part in parts(stats))])


def _time_of(stats: Mapping[str, Any]) -> Iterator[str]:
    if per_token := stats.get("seconds_per_token"):
        yield f"{_number(per_token)} s/token"
    elif first := stats.get("time_to_first_token_seconds"):
        yield f"{_number(first)} s"


def _drafting_of(stats: Mapping[str, Any]) -> Iterator[str]:
    if (per_pass := stats.get("tokens_per_pass")) and per_pass > 1:
        yield f"{per_pass:.2f} tokens a pass"
    if stats.get("drafted_tokens"):
        right = f"{stats['accepted_tokens']} of {stats['drafted_tokens']} drafted were right ({stats['draft']})"
        share = stats.get("draft_share_of_time")
        yield right if share is None else f"{right}, {share:.0%} of the time drafting"


def _reading_of(stats: Mapping[str, Any]) -> Iterator[str]:
    if (rate := stats.get("read_bytes_per_second")) and stats.get("bytes_read"):
        yield format_rate(rate)
        yield f"{stats.get('seconds_waiting_for_disk') or 0:.1f} s waiting for the disk"
    if retries := stats.get("read_retries"):
        yield f"{retries} reads were refused at first and tried again: look at the drive"


def _experts_of(stats: Mapping[str, Any]) -> Iterator[str]:
    if routed := stats.get("experts_routed"):
        share = stats.get("experts_prefetched", 0) / routed
        prefetched = f", {share:.0%} prefetched" if share else ""
        yield f"{stats['expert_hits'] / routed:.0%} of the experts were there{prefetched}"


def _memory_of(stats: Mapping[str, Any]) -> Iterator[str]:
    if peak := stats.get("peak_rss_bytes"):
        budget = stats.get("memory_budget_bytes")
        yield f"peak {format_size(peak)}" + (f" of {format_size(budget)}" if budget else "")


_SUMMARY = (_time_of, _drafting_of, _reading_of, _experts_of, _memory_of)


_COUNTED = (
    "bytes_read",
    "seconds_waiting_for_disk",
    "passes",
    "new_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "experts_routed",
    "expert_hits",
    "experts_prefetched",
)


def of_one_answer(before: Mapping[str, Any], after: Mapping[str, Any], answered: StatusLine) -> dict[str, Any]:
    """The stats of the last answer alone, out of those of a model that has given others before."""
    of_it = dict(after)
    for key in _COUNTED:
        if after.get(key) is not None:
            of_it[key] = after[key] - (before.get(key) or 0)
    of_it["draft_share_of_time"] = None  # known of all answers together only
    of_it["seconds_per_token"] = answered.seconds_per_token
    of_it["time_to_first_token_seconds"] = answered.seconds_to_first_token
    of_it["read_bytes_per_second"] = of_it.get("bytes_read", 0) / answered.seconds if answered.seconds > 0 else None
    of_it["tokens_per_pass"] = of_it["new_tokens"] / of_it["passes"] if of_it.get("passes") else None
    return of_it


def drafting(stats: Mapping[str, Any]) -> str:
    """What proposes tokens and why, in one line; empty where there is nothing to report."""
    if stats.get("draft", "none") == "none":
        return ""
    memory = f", {format_size(stats['draft_bytes'])}" if stats.get("draft_bytes") else ""
    return f"draft: {stats['draft']}{memory} · {stats['draft_reason']}"


def nothing_drafted(stats: Mapping[str, Any]) -> str:
    """Why nothing was drafted, in one line, where a draft was there; empty where something was."""
    asked = stats.get("draft", "none") != "none" and str(stats.get("draft_reason", "")).startswith("asked for")
    if stats.get("drafted_tokens") or not asked:
        return ""
    return f"draft: {stats['draft']} proposed nothing · {stats['draft_reason']}"


def intention(plan: Mapping[str, Any]) -> str:
    """What a loaded model is about to do, in one line."""
    budget = f"{format_size(plan['memory_budget_bytes'])} given"
    kept = f"{format_size(plan['resident_bytes'])} of {format_size(plan['model_bytes'])} stay in memory"
    if not plan.get("bytes_read_per_pass"):
        return f"{budget} · all {format_size(plan['model_bytes'])} of the weights stay in memory"
    read = f"{format_size(plan['bytes_read_per_pass'])} are read for each pass"
    if plan.get("expert_slots"):  # else all of them stay, or there are none
        kept += f", {plan['expert_slots']:,} of {plan['experts']:,} experts are kept"
        read = f"about {format_size(plan['bytes_read_per_pass'])} are read for each token"
    drafted = plan.get("predicted_seconds_per_token_drafted")
    each = (
        f"about {_number(drafted)} s/token with its draft"
        if drafted
        else (f"about {_number(plan['predicted_seconds_per_token'])} s/token{_not_paid(plan)}")
    )
    return f"{budget} · {kept} · {read} · {each}"


def _not_paid(plan: Mapping[str, Any]) -> str:
    """A word of warning where unpacking takes longer than reading more would."""
    plain = plan.get("predicted_seconds_per_token_plain")
    if plain is None or plain >= plan["predicted_seconds_per_token"]:
        return ""
    rate = format_rate(plan["decoding_bytes_per_second"])
    return f" (unpacking at {rate} is slower than this disk: uncompressed about {_number(plain)} s/token)"


def split_summary(result: Mapping[str, Any]) -> str:
    """What a split made, in one line."""
    of = f" ({result['bytes'] / result['source_bytes']:.1%})" if result["source_bytes"] else ""
    parts = [f"{format_size(result['source_bytes'])} became {format_size(result['bytes'])}{of}"]
    parts.append(f"{result['files']} files" if result["files"] != 1 else "1 file")
    if result["files_kept"]:
        parts.append(f"{result['files_kept']} were there already")
    if result["files_kept"] < result["files"]:
        parts.append(f"{_number(result['seconds'])} s")
    if result["deleted"]:
        parts.append(f"{len(result['deleted'])} files of the original deleted")
    return " · ".join(parts)


_PLAN_ROWS = {
    "model_bytes": "weights",
    "parameters": "parameters",
    "memory_budget_bytes": "memory budget",
    "minimum_memory_bytes": "least memory that is enough",
    "resident_bytes": "stays in memory",
    "ring_bytes": "window for the rest",
    "expert_bytes": "experts, read when routed to",
    "experts": "experts in all layers",
    "expert_slots": "experts kept in memory",
    "expert_cache_bytes": "memory for them",
    "active_bytes_per_token": "weights a token needs",
    "kv_cache_bytes": "KV cache",
    "draft_bytes": "draft, and verifying it",
    "activation_bytes": "activations",
    "overhead_bytes": "Python and its libraries",
    "already_held_bytes": "held by this process besides",
    "bytes_read_per_pass": "read for each pass",
    "units": "units moved as one",
    "predicted_seconds_per_token": "predicted time a token",
    "predicted_seconds_per_token_plain": "the same uncompressed",
    "predicted_seconds_per_token_drafted": "the same with the draft",
    "draft": "draft",
    "draft_reason": "why",
}

_BENCH_ROWS = {
    "seconds_per_token": "time a token (median)",
    "predicted_seconds_per_token": "the forecast for this drive",
    "planned_seconds_per_token": "the forecast when it was loaded",
    "time_to_first_token_seconds": "time to the first token",
    "load_seconds": "time to load",
    "tokens_per_pass": "tokens a pass",
    "draft": "draft",
    "drafted_tokens": "drafted tokens",
    "accepted_tokens": "of them right",
    "accepted_by_position": "right, by position",
    "draft_share_of_time": "time spent drafting",
    "draft_bytes": "memory of the draft",
    "bytes_read_per_pass": "read for each pass",
    "active_bytes_per_token": "weights a token needs",
    "expert_bytes_per_token": "of experts, read a token",
    "expert_hit_rate": "experts that were there",
    "expert_prefetched_rate": "experts that were prefetched",
    "read_bytes_per_second": "read at",
    "disk_bytes_per_second": "the disk alone gives",
    "disk_fraction": "share of the disk reached",
    "peak_rss_bytes": "peak memory",
    "memory_budget_bytes": "memory budget",
    "resident_bytes": "stays in memory",
    "model_bytes": "weights",
}


def _number(value: float) -> str:
    """Three significant digits, never with an exponent for what is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plan_table(plan: Mapping[str, Any]) -> str:
    """What would live where, as two columns."""
    rows = _rows(plan, _PLAN_ROWS)
    if (context := plan.get("context_tokens")) and "KV cache" in rows:
        rows["KV cache"] += f" for {context} tokens"
    return "\n".join([_table(rows), *(f"fallback: {reason}" for reason in plan.get("fallbacks") or ())])


def bench_table(result: Mapping[str, Any]) -> str:
    """What was measured, as two columns; where the time goes below, if that was asked for."""
    table = _table(_rows(result, _BENCH_ROWS))
    return f"{table}\n\n{profile_table(result['profile'])}" if "profile" in result else table


_SPLIT_ROWS = {
    "waiting_for_disk": "waiting for the disk",
    "decoding": "unpacking",
    "copying": "copying",
    "computing": "computing",
    "lamina_python": "lamina's Python",
    "model_python": "the model's Python",
    "between_passes": "between passes",
}

_DISK_ROWS = {
    "busy_share": "disk at work",
    "reads_in_flight": "reads under way (mean)",
    "bytes_per_second_busy": "read at, while at work",
    "idle_seconds": "disk idle",
    "idle_ring_full_seconds": "of it, no room to read into",
}


def profile_table(profile: Mapping[str, Any]) -> str:
    """Where the seconds of a decode step go, what the disk did meanwhile, and where the trace is."""
    step = profile["seconds_per_step"]
    under = f"{_number(profile['profiled_seconds_per_step'])} s under torch's profiler"
    rows = {"a step": f"{_number(step)} s (mean of {profile['steps']}; {under})"}
    for key, label in _SPLIT_ROWS.items():
        rows[f"  {label}"] = f"{_number(profile['seconds'][key])} s  {profile['shares'][key]:.1%}"
    if calls := profile.get("lamina_python_by_call"):
        most = sorted(calls, key=calls.__getitem__, reverse=True)[:3]
        rows["  lamina's Python"] += f"  ({', '.join(f'{call} {_number(calls[call])} s' for call in most)}, ...)"
    rows["Python of a pass"] = f"{_number(profile['python_seconds_per_pass'])} s  {profile['python_share_of_pass']:.1%}"
    disk = profile["disk"]
    if disk.get("bytes_per_step"):
        rows |= {label: _show(key, disk[key]) for key, label in _DISK_ROWS.items() if disk.get(key) is not None}
    return f"{_table(rows)}\n{trace_line(profile['trace'])}"


def trace_line(trace: Mapping[str, Any]) -> str:
    """Where a trace is and what opens it."""
    left_out = ""
    if dropped := trace.get("operations_dropped"):
        below = trace["dropped_below_seconds"] * 1e6
        left_out = f", {dropped:,} operations below {below:.0f} microseconds left out"
    return f"trace: {trace['file']} ({format_size(trace['bytes'])}{left_out}), open it at https://ui.perfetto.dev"


def _rows(record: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, str]:
    shown = [key for key in labels if record.get(key) is not None and not _about_nothing(key, record)]
    return {labels[key]: _show(key, record[key]) for key in shown}


def _about_nothing(key: str, record: Mapping[str, Any]) -> bool:
    """Whether a row would be about what there is none of: a draft, experts, other memory of this process."""
    if key in ("draft_bytes", "already_held_bytes") and not record[key]:
        return True
    if "draft" in key or key.startswith("accepted"):
        return record.get("draft") == "none"
    if key.startswith(("expert", "active")):
        return not record.get("experts") and record.get("expert_hit_rate") is None
    return False


def _show(key: str, value: Any) -> str:
    if key == "accepted_by_position":
        return " ".join(f"{share:.0%}" for share in value[:SHOWN_POSITIONS]) or "none was verified"
    if isinstance(value, list | tuple):
        return str(len(value))
    if key.endswith(("bytes_per_second", "bytes_per_second_busy")):
        return format_rate(value)
    if key.endswith(("share_of_time", "fraction", "hit_rate", "prefetched_rate", "share")):
        return f"{value:.0%}"
    if "seconds" in key:
        return f"{_number(value)} s"
    if "bytes" in key:
        return format_size(value)
    if key in ("parameters", "experts", "expert_slots"):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())
