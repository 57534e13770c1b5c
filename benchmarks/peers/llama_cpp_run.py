"""llama.cpp through llama-cpp-python, weights mapped into memory, on the BF16 GGUF of the same weights:

DIR/llama_cpp/bin/python benchmarks/peers/llama_cpp_run.py .cache/bench/llama-3b       (reads llama-3b.gguf beside it)
"""

import os
from pathlib import Path

import numpy as np
from clock import TokenClock, ids_of, parser, tell

END_OF_SEQUENCE = 2


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gguf", type=Path, help="default: CHECKPOINT.gguf")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    given = arguments.parse_args()
    gguf = given.gguf or given.checkpoint.with_name(given.checkpoint.name + ".gguf")
    clock = TokenClock()

    from llama_cpp import Llama

    ids = ids_of(given.prompt_ids)
    model = Llama(
        model_path=str(gguf),
        n_ctx=max(64, len(ids) + given.new_tokens),
        n_threads=given.threads,
        n_threads_batch=given.threads,
        use_mmap=True,
        verbose=False,
    )
    clock.ready()
    fed = ids
    for _ in range(given.new_tokens):
        model.eval(fed)
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),)).copy()
        logits[END_OF_SEQUENCE] = -np.inf  # as min_new_tokens does in transformers
        fed = [int(logits.argmax())]
        clock.token(fed[0])
    tell(clock.result("llama_cpp"))


if __name__ == "__main__":
    main()
