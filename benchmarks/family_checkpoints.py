"""Sparse checkpoints of several families, at a real width and a few layers: they prove memory, never speed.

python benchmarks/family_checkpoints.py .cache/bench/families          # all of them, each in a folder of its own
python benchmarks/family_checkpoints.py .cache/bench/families mamba gpt2
"""

import argparse
from pathlib import Path

import torch
from checkpoints import split_into_shards, write_folder
from report import run_main
from transformers import AutoConfig, AutoModelForCausalLM

Shape = tuple[str, dict[str, object]]
"""model type, fields of the config"""


def _llama(layers: int, hidden: int, ffn: int, heads: int, vocabulary: int) -> Shape:
    fields = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    return "llama", fields | {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": vocabulary}


FAMILIES: dict[str, Shape] = {
    "bloom": ("bloom", {"hidden_size": 1536, "n_layer": 6, "n_head": 16, "vocab_size": 60_000}),
    "falcon": ("falcon", {"hidden_size": 4544, "num_hidden_layers": 2, "num_attention_heads": 71}),
    "gemma3": (
        "gemma3_text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 8, "num_attention_heads": 4}
        | {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144},
    ),
    "gpt2": ("gpt2", {"n_embd": 1024, "n_layer": 12, "n_head": 16, "n_positions": 2048}),
    "llama-8b": _llama(2, 4096, 14_336, 32, 128_256),
    "llama-70b": _llama(1, 8192, 28_672, 64, 32_000),
    "llama-405b": _llama(1, 16_384, 53_248, 128, 128_256),
    "mamba": ("mamba", {"hidden_size": 1024, "num_hidden_layers": 12, "vocab_size": 50_280}),
    "opt": (
        "opt",
        {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 6, "num_attention_heads": 32}
        | {"word_embed_proj_dim": 2048, "max_position_embeddings": 2048},
    ),
    "phi3": (
        "phi3",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "vocab_size": 32_064, "pad_token_id": 0},
    ),
}


def write_family(folder: Path, family: str) -> int:
    """Write the checkpoint of a family; the bytes of weights that it stands for."""
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, dtype="bfloat16", **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = model.all_tied_weights_keys
    tensors = {name: tuple(t.shape) for name, t in model.named_parameters(remove_duplicate=False) if name not in tied}
    written = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    return write_folder(folder, written, tensors, split_into_shards(tensors), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    given = parser.parse_args()
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"no family named {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    for family in given.families or FAMILIES:
        folder = given.folder / family
        if not (folder / "config.json").exists():
            print(f"{folder}: {write_family(folder, family) / 1e9:.2f} GB of weights (sparse)")


if __name__ == "__main__":
    run_main(main)
