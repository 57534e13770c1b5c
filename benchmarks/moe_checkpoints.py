"""Mixture-of-experts checkpoints to measure with: random Mixtrals and Qwen3-MoEs under the names that the hub has.

    python benchmarks/moe_checkpoints.py .cache/bench/mixtral-12gb
    python benchmarks/moe_checkpoints.py .cache/bench/qwen3moe-11gb --gguf    # and the same for llama.cpp
    python benchmarks/moe_checkpoints.py .cache/bench/qwen3-235b --sparse     # 470 GB that take no room on disk
    python benchmarks/moe_checkpoints.py .cache/bench/odd --shape qwen3moe-tiny --layers 3 --experts 24 --chosen 4

The shape is the folder's name where --shape does not say. Every expert is tensors of its own, in the order that
safetensors gives the files of the hub: by name within a file. Weights keep activations near 1 and router logits near
a deviation of 1, and a token's embedding outweighs what attention mixes in, so that tokens go to different experts.
Every expert is as likely as another, which real routers are not: a cache of experts finds less here than there.
--sparse writes holes, as in checkpoints.py: good for memory, no good for speed, and every token takes the same experts.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from checkpoints import nbytes, split_into_shards, write_folder, write_tokenizer
from gguf_copies import write_copy
from report import need_disk, run_main


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a mixture of experts; `ffn` is one expert's, `chosen` are the experts of a token."""

    family: str
    layers: int
    hidden: int
    ffn: int
    experts: int
    chosen: int
    heads: int
    kv_heads: int
    head: int
    vocab: int


SHAPES = {
    "mixtral-tiny": MoeShape("mixtral", 4, 256, 512, 8, 2, 4, 2, 64, 1000),
    "mixtral-12gb": MoeShape("mixtral", 4, 4096, 14336, 8, 2, 32, 8, 128, 32000),
    "mixtral-8x7b": MoeShape("mixtral", 32, 4096, 14336, 8, 2, 32, 8, 128, 32000),
    "mixtral-8x22b": MoeShape("mixtral", 56, 6144, 16384, 8, 2, 48, 8, 128, 32000),
    "qwen3moe-tiny": MoeShape("qwen3_moe", 4, 256, 96, 32, 4, 4, 2, 64, 1000),
    "qwen3moe-11gb": MoeShape("qwen3_moe", 9, 2048, 768, 128, 8, 32, 4, 128, 32000),
    "qwen3-30b": MoeShape("qwen3_moe", 48, 2048, 768, 128, 8, 32, 4, 128, 151936),
    "qwen3-235b": MoeShape("qwen3_moe", 94, 4096, 1536, 128, 8, 64, 4, 128, 151936),
}

# What the families call a layer's parts: the block of experts, and an expert's way in, its gate and its way out.
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
EXPERTS = {"mixtral": ("w3", "w1", "w2"), "qwen3_moe": ("up_proj", "gate_proj", "down_proj")}


def tensor_shapes(shape: MoeShape) -> dict[str, tuple[int, ...]]:
    """The tensors of a mixture of experts without tied embeddings, in the order of a forward pass."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        tensors |= {f"model.layers.{i}.{name}.weight": dims for name, dims in layer_shapes(shape).items()}
    return tensors | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def layer_shapes(shape: MoeShape) -> dict[str, tuple[int, ...]]:
    wide, narrow = shape.heads * shape.head, shape.kv_heads * shape.head
    block, (up, gate, down) = BLOCKS[shape.family], EXPERTS[shape.family]
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (wide, shape.hidden),
        "self_attn.k_proj": (narrow, shape.hidden),
        "self_attn.v_proj": (narrow, shape.hidden),
        "self_attn.o_proj": (shape.hidden, wide),
        "post_attention_layernorm": (shape.hidden,),
        f"{block}.gate": (shape.experts, shape.hidden),
    }
    if shape.family == "qwen3_moe":
        tensors |= {"self_attn.q_norm": (shape.head,), "self_attn.k_norm": (shape.head,)}
    for e in range(shape.experts):
        tensors |= {
            f"{block}.experts.{e}.{up}": (shape.ffn, shape.hidden),
            f"{block}.experts.{e}.{gate}": (shape.ffn, shape.hidden),
            f"{block}.experts.{e}.{down}": (shape.hidden, shape.ffn),
        }
    return tensors


def config_of(shape: MoeShape) -> dict[str, object]:
    config: dict[str, object] = {
        "model_type": shape.family,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "num_experts_per_tok": shape.chosen,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "output_router_logits": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.family == "mixtral":
        return config | {
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": shape.ffn,
            "num_local_experts": shape.experts,
            "rms_norm_eps": 1e-5,
        }
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 3 * shape.hidden,  # of layers without experts, of which there are none
        "moe_intermediate_size": shape.ffn,
        "num_experts": shape.experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
    }


def random_weights(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal: the embedding with deviation 1, a matrix with 1/sqrt(inputs), so that it keeps its input's size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    deviation = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, deviation, generator=generator)


def write_checkpoint(folder: Path, shape: MoeShape, sparse: bool = False, seed: int = 0) -> int:
    """Write config, shards and index into `folder`; the bytes of weights it stands for."""
    generator = torch.Generator().manual_seed(seed)
    tensors = tensor_shapes(shape)
    shards = [sorted(names) for names in split_into_shards(tensors)]
    weights = None if sparse else lambda name: random_weights(name, tensors[name], generator)
    return write_folder(folder, config_of(shape), tensors, shards, weights)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, help="default: the folder's name")
    parser.add_argument("--sparse", action="store_true", help="holes in place of weights: no room on disk, zeros")
    parser.add_argument("--gguf", action="store_true", help="also write FOLDER.gguf for llama.cpp (not for --sparse)")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(MoeShape):
        if field.type is int:
            parser.add_argument("--" + field.name.replace("_", "-"), type=int, help="in place of the named shape's")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or arguments.folder.name
    if arguments.shape not in SHAPES:
        parser.error(f"no shape named {arguments.shape}: give --shape, one of {', '.join(SHAPES)}")
    if arguments.sparse and arguments.gguf:
        parser.error("--gguf copies every byte: not with --sparse")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    given = {field.name: getattr(arguments, field.name, None) for field in fields(MoeShape)}
    shape = replace(SHAPES[arguments.shape], **{name: size for name, size in given.items() if size is not None})
    if (arguments.folder / "config.json").exists():
        print(f"{arguments.folder} is there already: kept")
    else:
        sizes = tensor_shapes(shape)
        if not arguments.sparse:
            need_disk(arguments.folder, sum(map(nbytes, sizes.values())), arguments.folder.name)
        total = write_checkpoint(arguments.folder, shape, sparse=arguments.sparse, seed=arguments.seed)
        experts = sum(nbytes(dims) for name, dims in sizes.items() if ".experts." in name)
        print(
            f"{arguments.folder}: {total / 1e9:.2f} GB of weights{' (sparse)' if arguments.sparse else ''}, "
            f"{experts / 1e9:.2f} GB of them in {shape.layers * shape.experts} experts"
        )
    if not (arguments.folder / "tokenizer.json").exists():
        write_tokenizer(arguments.folder, shape.vocab)
    if arguments.gguf:
        write_copy(arguments.folder)


if __name__ == "__main__":
    run_main(main)
