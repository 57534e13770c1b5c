"""llama.cpp through llama-cpp-python on the GGUF file of the same weights, mapped into memory unless --no-mmap:

DIR/llama_cpp/bin/python benchmarks/peers/llama_cpp_run.py .cache/bench/llama-3b       (reads llama-3b.gguf beside it)

A pass takes the whole prompt at once, or all sequences at once, so that no weight is swept twice where once will do.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from clock import END_OF_SEQUENCE, TokenClock, parser, prompts, tell

GRAIN = 256  # llama.cpp's contexts are multiples of it


class Context:
    """A model and a context of llama.cpp, by the C functions: the only way to many sequences at once."""

    def __init__(self, gguf: Path, given: argparse.Namespace) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)  # kept, or C calls what is gone
        llama_cpp.llama_log_set(self._log, None)
        model_settings = llama_cpp.llama_model_default_params()
        mapped, read = llama_cpp.LLAMA_LOAD_MODE_MMAP, llama_cpp.LLAMA_LOAD_MODE_NONE
        model_settings.load_mode, model_settings.n_gpu_layers = read if given.no_mmap else mapped, 0
        model_settings.use_extra_bufts = not given.no_repack
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_settings)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {gguf.name}")
        tokens = given.sequences * given.prompt_tokens
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-(tokens + given.sequences * given.new_tokens) // GRAIN) * GRAIN
        settings.n_batch = settings.n_ubatch = max(tokens, 32)
        settings.n_seq_max, settings.kv_unified = given.sequences, True
        settings.n_threads = settings.n_threads_batch = given.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp could not make a context of {settings.n_ctx} tokens")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(tokens, given.sequences), 0, 1)

    def next_tokens(self, fed: list[list[int]], at: int) -> list[int]:
        """One pass over what each sequence is given from position `at` on: the likeliest next token of each."""
        batch, asked = self.batch, []
        batch.n_tokens = 0
        for sequence, ids in enumerate(fed):
            for i, token in enumerate(ids):
                slot = batch.n_tokens
                batch.token[slot], batch.pos[slot] = token, at + i
                batch.n_seq_id[slot], batch.seq_id[slot][0] = 1, sequence
                batch.logits[slot] = i == len(ids) - 1
                batch.n_tokens += 1
            asked.append(batch.n_tokens - 1)
        if code := self.api.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {code}")
        return [self._likeliest(slot) for slot in asked]

    def _likeliest(self, slot: int) -> int:
        found = self.api.llama_get_logits_ith(self.context, slot)
        logits = np.ctypeslib.as_array(found, shape=(self.vocab,)).copy()
        logits[END_OF_SEQUENCE] = -np.inf  # as min_new_tokens does in transformers
        return int(logits.argmax())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gguf", type=Path, help="default: CHECKPOINT.gguf")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--no-mmap", action="store_true", help="read the file into memory")
    arguments.add_argument(
        "--no-repack", action="store_true", help="compute on the file's own layout: repacked weights stay in memory"
    )
    given = arguments.parse_args()
    clock = TokenClock()
    engine = Context(given.gguf or given.checkpoint.with_name(given.checkpoint.name + ".gguf"), given)
    clock.ready()
    fed, at = prompts(given), 0
    answers: list[list[int]] = [[] for _ in fed]
    for _ in range(given.new_tokens):
        found = engine.next_tokens(fed, at)
        at += len(fed[0])
        fed = [[token] for token in found]
        for answer, token in zip(answers, found, strict=True):
            answer.append(token)
        clock.token(found[0])
    name = "llama_cpp_nommap" if given.no_mmap else "llama_cpp"
    tell(clock.result(name) if given.sequences == 1 else clock.batch_result(name, answers, given.new_tokens))


if __name__ == "__main__":
    main()
