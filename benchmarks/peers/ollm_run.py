"""oLLM on the CPU, for a Llama in shards (benchmarks/peers.sh):

DIR/transformers_457/bin/python benchmarks/peers/ollm_run.py .cache/bench/llama-3b

It is made for GPUs, and its package asks for flash-attn, which builds only with CUDA; without that its Llama runs on
any device of torch. It reads the checkpoint's own files, layer by layer.
"""

import contextlib
import sys

from clock import TokenClock, parser, prompts, tell


def main() -> None:
    given = parser(__doc__).parse_args()
    clock = TokenClock()
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        import torch
        from ollm import AutoInference

        model = AutoInference(str(given.checkpoint), device="cpu", logging=False).model
        clock.ready()
        model.generate(
            input_ids=torch.tensor(prompts(given)),
            min_new_tokens=given.new_tokens,
            max_new_tokens=given.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    tell(clock.result("ollm"))


if __name__ == "__main__":
    main()
