"""What happened so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.sizes import format_size


@dataclass(frozen=True)
class Stats:
    """What happened so far; a snapshot. Bytes and seconds.

    Attributes:
        passes: forward passes that came to their end.
        bytes_read: from disk, resident weights included.
        new_tokens: tokens that `generate` gave, all sequences together.
        tokens_per_pass: new tokens over passes within `generate`.
        seconds_per_token: median time of a decode step; where steps give several tokens, their time over their tokens.
        seconds_waiting_for_disk: the model stood still because a unit was not there yet.
        seconds_in_passes: from entering the model to leaving it.
        bytes_read_per_pass: of a decode step of one token, as planned.
        read_bytes_per_second: bytes of the decode steps over their time.
        pass_bytes_done: read for the pass under way, `pass_bytes_expected` those that it will come to.
        in_pass: a pass is under way.
        active_bytes_per_token: of the weights that one token needs, wherever they are.
        experts_routed: experts that calls were routed to, each once a call; 0 where all of them are resident.
        expert_hits: of these, how many were in the cache; `experts_foreseen` were there or on their way because the
            layer before told so, `expert_misses` had to be read; `expert_bytes_read` in all.
        expert_hit_rate: hits over experts routed; None where there were none, 1 where all experts are resident.
        expert_bytes_per_token: of experts, read in the decode steps, over the tokens they gave.
        expert_tokens: by module, tokens that were routed to each of its experts.
        draft: what proposes tokens, `draft_reason` why this or why nothing, `draft_bytes` what it has of the memory.
        drafted_tokens: that passes verified; `accepted_tokens` of them were what the model itself chose.
        accepted_by_position: of the first token of a draft, the second and so on, the share that was right where all
            before it were.
        draft_share_of_time: of the time after the first token of an answer, what proposing took.
        fallbacks: second ways that were taken so far, each with its reason.
        read_retries: reads that the operating system refused, and that were tried once more.
    """

    passes: int
    bytes_read: int
    new_tokens: int
    tokens_per_pass: float
    seconds_per_token: float
    seconds_waiting_for_disk: float
    seconds_in_passes: float
    peak_rss_bytes: int
    memory_budget_bytes: int
    resident_bytes: int
    model_bytes: int
    bytes_read_per_pass: int
    read_bytes_per_second: float
    load_seconds: float
    time_to_first_token_seconds: float
    pass_bytes_done: int
    pass_bytes_expected: int
    in_pass: bool
    active_bytes_per_token: int
    experts_routed: int
    expert_hits: int
    experts_foreseen: int
    expert_misses: int
    expert_bytes_read: int
    expert_hit_rate: float | None
    expert_bytes_per_token: float
    expert_tokens: dict[str, tuple[int, ...]]
    draft: str
    draft_reason: str
    draft_bytes: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_by_position: tuple[float, ...]
    draft_share_of_time: float
    fallbacks: tuple[str, ...] = ()
    read_retries: int = 0

    def __repr__(self) -> str:
        """What matters, in a few lines; `dataclasses.asdict` has all of it."""
        size = format_size
        lines = [
            f"Stats: {self.passes} passes, {self.new_tokens} new tokens, {self.seconds_per_token:.3g} s a token, the "
            f"first after {self.time_to_first_token_seconds:.3g} s, loaded in {self.load_seconds:.3g} s",
            f"  read: {size(self.bytes_read)}, {size(self.bytes_read_per_pass)} in each pass, "
            f"{size(self.read_bytes_per_second)}/s; waited {self.seconds_waiting_for_disk:.3g} s for the disk of "
            f"{self.seconds_in_passes:.3g} s in passes",
            f"  memory: at most {size(self.peak_rss_bytes)} of {size(self.memory_budget_bytes)}; "
            f"{size(self.resident_bytes)} of {size(self.model_bytes)} of weights are resident",
        ]
        if self.experts_routed:
            lines.append(f"  experts: {self.experts_routed} routed to, {self.expert_hits} of them in the cache")
        if self.draft != "none":
            taken = f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted"
            lines.append(f"  draft: {self.draft}, {taken} ({self.draft_reason})")
        if self.read_retries:
            lines.append(f"  reads: {self.read_retries} failed for a moment and were tried again")
        return "\n".join([*lines, *(f"  fallback: {each}" for each in self.fallbacks)])
