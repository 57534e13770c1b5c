"""Lamina, as its user starts it: this becomes `lamina bench --json`, whose JSON has the keys of the other engines.

    python benchmarks/peers/lamina_run.py .cache/bench/llama-3b --memory 3GB

It replaces this process rather than starting a second one, which would count against the memory cap.
"""

import os
import sys

from clock import parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--memory", help="the budget; default: what Lamina finds free under the cap")
    given, more = arguments.parse_known_args()
    command = [sys.executable, "-c", "from lamina.cli.main import main; main()", "bench", str(given.checkpoint)]
    command += ["--memory", given.memory] if given.memory else []
    command += ["--prompt-ids", given.prompt_ids, "--new-tokens", str(given.new_tokens), "--json", *more]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
