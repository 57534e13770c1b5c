"""The clock that every engine is measured with: when each new token came, and one JSON line at the end.

Standard library only: the engines live in environments of their own.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

END_OF_SEQUENCE = 2
LEAST_VOCABULARY = 1000  # of the checkpoints that are measured: ids stay below it


def prompt(length: int, number: int = 0) -> list[int]:
    """The ids of prompt `number`: the same for every engine, none of them special."""
    return random.Random(number).choices(range(3, LEAST_VOCABULARY), k=length)


class TokenClock:
    """Takes the place of a transformers streamer: `put` is called with the prompt, then with each new token."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.loaded = self.asked = self.began
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt_seen = False

    def ready(self) -> None:
        """The engine has loaded; the prompt goes in now."""
        self.loaded = self.asked = time.perf_counter()

    def put(self, value: object) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.token(int(value.reshape(-1)[0]))  # type: ignore[attr-defined]

    def token(self, token: int) -> None:
        """One new token, now; on stderr too, so that a slow engine shows a sign of life."""
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        print(f"token {len(self.tokens)} after {self.times[-1] - self.asked:.2f} s", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The streamer's last call."""

    def result(self, engine: str, **more: object) -> dict[str, object]:
        steps = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return {
            "engine": engine,
            "load_seconds": self.loaded - self.began,
            "time_to_first_token_seconds": self.times[0] - self.asked,
            "seconds_per_token": statistics.median(steps) if steps else None,
            "step_seconds": [round(step, 4) for step in steps],
            "tokens": self.tokens,
            "peak_rss_bytes": peak_rss_bytes(),
            **more,
        }

    def batch_result(self, engine: str, answers: Sequence[Sequence[int]], passes: int) -> dict[str, object]:
        """For many sequences at once, right after the last token: seconds per token are over all tokens together."""
        took = time.perf_counter() - self.asked
        new = sum(map(len, answers))
        return {
            "engine": engine,
            "load_seconds": self.loaded - self.began,
            "batch_seconds": took,
            "seconds_per_token": took / new,
            "tokens_per_second": new / took,
            "passes": passes,
            "tokens": [list(answer) for answer in answers],
            "peak_rss_bytes": peak_rss_bytes(),
        }


def peak_rss_bytes() -> int | None:
    """The peak of this program's own address space (ru_maxrss would count the parent's before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every engine takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--prompt-tokens", type=int, default=16)
    made.add_argument("--new-tokens", type=int, default=4)
    made.add_argument("--sequences", type=int, default=1, help="prompts answered at once")
    return made


def prompts(given: argparse.Namespace) -> list[list[int]]:
    """The prompts that the arguments ask for."""
    return [prompt(given.prompt_tokens, number) for number in range(given.sequences)]


def tell(result: dict[str, object]) -> None:
    print(json.dumps(result), flush=True)
