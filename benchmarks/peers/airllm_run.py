"""AirLLM on the CPU, in its own environment (benchmarks/peers.sh):

    DIR/airllm/bin/python benchmarks/peers/airllm_run.py .cache/bench/llama-3b --split .cache/bench/airllm --prepare
    DIR/airllm/bin/python benchmarks/peers/airllm_run.py .cache/bench/llama-3b --split .cache/bench/airllm

AirLLM copies the checkpoint, layer by layer, before its first run: --prepare does only that, so that the copying is
not part of what is measured. It will not load a folder without a tokenizer; benchmarks/checkpoints.py writes one.
"""

import contextlib
import sys
from pathlib import Path

from clock import TokenClock, parser, prompts, tell


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--split", type=Path, required=True, help="where AirLLM's copy of the weights is or goes")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--prepare", action="store_true", help="write that copy and stop")
    given = arguments.parse_args()
    clock = TokenClock()
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        import torch
        from airllm import AutoModel

        given.split.mkdir(parents=True, exist_ok=True)
        model = AutoModel.from_pretrained(
            str(given.checkpoint), device=given.device, layer_shards_saving_path=str(given.split.resolve())
        )
        if given.prepare:
            return
        clock.ready()
        model.generate(
            torch.tensor(prompts(given), device=given.device),
            min_new_tokens=given.new_tokens,
            max_new_tokens=given.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
        )
    tell(clock.result("airllm"))


if __name__ == "__main__":
    main()
