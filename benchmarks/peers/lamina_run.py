"""Lamina, as its user starts it: this becomes `lamina bench --json`, whose JSON has the keys of the other engines.

    python benchmarks/peers/lamina_run.py .cache/bench/llama-3b --memory 3GB

With --startup it becomes `lamina run`: load, answer, leave. It replaces this process rather than starting a second one,
which would count against the memory cap.
"""

import os
import sys

from clock import parser, prompts


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--memory", help="the budget; default: what Lamina finds free under the cap")
    arguments.add_argument("--startup", action="store_true", help="`lamina run` in place of `lamina bench`")
    given, more = arguments.parse_known_args()
    (ids,) = prompts(given)
    verb, count = ("run", "--max-new-tokens") if given.startup else ("bench", "--new-tokens")
    command = [sys.executable, "-c", "from lamina.cli.main import main; main()", verb, str(given.checkpoint)]
    command += ["--memory", given.memory] if given.memory else []
    command += ["--prompt-ids", ",".join(map(str, ids)), count, str(given.new_tokens), "--json", *more]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
