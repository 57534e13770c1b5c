"""Checkpoints to measure with: a random Llama of any shape, as a user's folder would hold it.

    python benchmarks/checkpoints.py .cache/bench/llama-3b                          # 6.03 GB of bfloat16
    python benchmarks/checkpoints.py .cache/bench/llama-3b --gguf                   # and the same for llama.cpp
    python benchmarks/checkpoints.py .cache/bench/llama-70b --shape 70b --sparse    # takes no room on disk
    python benchmarks/checkpoints.py .cache/bench/odd --layers 4 --hidden 512 --ffn 1536 --heads 8 --kv-heads 2

--sparse writes holes in place of weights: they read as zeros at memory speed, yet every byte moves through the engine.
That proves a memory promise and says nothing about speed. --gguf writes DIR.gguf (BF16), see gguf_copies.py.
"""

import argparse
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf_copies import write_copy
from report import need_disk, run_main

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(4, 256, 768, 8, 4, 1000),
    "3b": Shape(28, 3072, 8192, 24, 8, 32000),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "70b": Shape(80, 8192, 28672, 64, 8, 32000),
    "405b": Shape(126, 16384, 53248, 128, 8, 128256),
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama without tied embeddings, in the order of a forward pass."""
    wide, narrow = shape.heads * shape.head, shape.kv_heads * shape.head
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": (shape.hidden,),
            layer + "self_attn.q_proj.weight": (wide, shape.hidden),
            layer + "self_attn.k_proj.weight": (narrow, shape.hidden),
            layer + "self_attn.v_proj.weight": (narrow, shape.hidden),
            layer + "self_attn.o_proj.weight": (shape.hidden, wide),
            layer + "post_attention_layernorm.weight": (shape.hidden,),
            layer + "mlp.gate_proj.weight": (shape.ffn, shape.hidden),
            layer + "mlp.up_proj.weight": (shape.ffn, shape.hidden),
            layer + "mlp.down_proj.weight": (shape.hidden, shape.ffn),
        }
    return tensors | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape, dtype=np.int64))


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def split_into_shards(tensors: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.items():
        if shards[-1] and size + nbytes(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(shape)
    return shards


def random_weights(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal with deviation 0.02 for matrices, ones for norms, as transformers would begin."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def write_checkpoint(folder: Path, shape: Shape, sparse: bool = False, seed: int = 0) -> int:
    """Write config, shards and index of a Llama into `folder`; the bytes of weights it stands for."""
    generator = torch.Generator().manual_seed(seed)
    tensors = tensor_shapes(shape)
    weights = None if sparse else lambda name: random_weights(tensors[name], generator)
    return write_folder(folder, config_of(shape), tensors, split_into_shards(tensors), weights)


def write_folder(
    folder: Path,
    config: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    shards: list[list[str]],
    weights: Callable[[str], torch.Tensor] | None,
) -> int:
    """Write a checkpoint as the hub has it, one tensor in memory at a time; the bytes of weights it stands for.

    Args:
        tensors: the shape of each bfloat16 tensor by name.
        shards: the names in each file, in the order of their bytes.
        weights: from a name to its tensor; None for holes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + nbytes(tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            if weights is None:
                out.truncate(8 + len(raw) + at)
                continue
            for name in names:
                out.write(weights(name).view(torch.int16).numpy().data)
    total = sum(map(nbytes, tensors.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: a folder with a config is whole
    return total


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A word-level tokenizer of made-up words `t0 t1 ...`, for peers that will not load a folder without one."""
    vocabulary = {f"t{i}": i for i in range(vocab)}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--sparse", action="store_true", help="holes in place of weights: no room on disk, zeros")
    parser.add_argument("--gguf", action="store_true", help="also write FOLDER.gguf for llama.cpp (not for --sparse)")
    parser.add_argument("--seed", type=int, default=0)
    for name in Shape.__dataclass_fields__:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="in place of the named shape's")
    arguments = parser.parse_args()
    if arguments.sparse and arguments.gguf:
        parser.error("--gguf copies every byte: not with --sparse")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    given = {name: getattr(arguments, name) for name in Shape.__dataclass_fields__}
    base = SHAPES[arguments.shape]
    shape = Shape(**{name: getattr(base, name) if value is None else value for name, value in given.items()})
    if (arguments.folder / "config.json").exists():
        print(f"{arguments.folder} is there already: kept")
    else:
        if not arguments.sparse:
            need_disk(arguments.folder, sum(map(nbytes, tensor_shapes(shape).values())), arguments.folder.name)
        total = write_checkpoint(arguments.folder, shape, sparse=arguments.sparse, seed=arguments.seed)
        print(f"{arguments.folder}: {total / 1e9:.2f} GB of weights{' (sparse)' if arguments.sparse else ''}")
    if not (arguments.folder / "tokenizer.json").exists():
        write_tokenizer(arguments.folder, shape.vocab)
    if arguments.gguf:
        write_copy(arguments.folder)


if __name__ == "__main__":
    run_main(main)
