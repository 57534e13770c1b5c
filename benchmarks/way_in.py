"""How far a reader has to go: the files of Lamina that a request enters until its first token, and changes of file.

    python benchmarks/way_in.py

A tiny random Llama is loaded and asked for one token under `sys.setprofile`; only functions of the package count. What
counts is the second of two requests: the first imports modules on its way, whose class bodies and functions would count
as well. No figure is of speed. The last line on stdout is one JSON object.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from report import run_main, stamp
from transformers import LlamaConfig, LlamaForCausalLM

import lamina

PACKAGE = str(Path(lamina.__file__).parent)


class Way:
    """Counts calls of functions by file, in the thread that asks."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.changes = 0
        self._last = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name == "<module>" or not code.co_filename.startswith(PACKAGE):
            return
        file = code.co_filename[len(PACKAGE) + 1 :]
        self.calls[file] += 1
        self.changes += file != self._last
        self._last = file


def way_of(folder: str) -> Way:
    """The way of a request, from the call of `from_pretrained` to the first token."""
    way = Way()
    sys.setprofile(way)
    try:
        with lamina.AutoModel.from_pretrained(folder, draft=None, context=64) as model:
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1)
    finally:
        sys.setprofile(None)
    return way


def main() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(folder)
        way_of(folder)
        way = way_of(folder)
    rooms: dict[str, int] = Counter(file.rpartition("/")[0] or "(root)" for file in way.calls)
    for room, files in sorted(rooms.items()):
        print(f"{room:12} {files:3} files entered")
    figures = {"files_entered": len(way.calls), "changes_of_file": way.changes, "calls": sum(way.calls.values())}
    print(json.dumps(stamp() | figures))


if __name__ == "__main__":
    run_main(main)
