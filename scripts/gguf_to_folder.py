"""gguf_to_folder.py FILE.gguf FOLDER: write a quantised GGUF as an ordinary bf16 folder, tokenizer and all.

The folder appears whole or not at all. The weights are the GGUF's, unpacked: close to the original's, not equal.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as `folder`, by way of a folder beside it."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.bfloat16,
        # A model that keeps its GGUF blocks cannot be saved as safetensors.
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    logging.disable_progress_bar()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
