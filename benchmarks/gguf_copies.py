"""The weights of a checkpoint again as a BF16 GGUF file, for llama.cpp: a Llama, a Mixtral or a Qwen3-MoE.

Not a script: `checkpoints.py --gguf` and `moe_checkpoints.py --gguf` write through it.

Both files compute the same function of token ids: query and key rows are permuted where llama.cpp rotates neighbours
(its "llama" architecture, which Mixtral is one of), norms and routers are float32 as llama.cpp wants them, the
experts of a layer become one tensor, and the vocabulary is made up. One tensor is in memory at a time.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import gigabytes, need_disk

INDEX = "model.safetensors.index.json"
ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
ROPE_OF_NEIGHBOURS = "llama"  # the architecture whose query and key rows are reordered

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"}
EXPERTS = {
    "mixtral": {
        part: f"block_sparse_moe.experts.{{}}.{w}" for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
    "qwen3_moe": {part: f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Piece:
    """One tensor of the GGUF file: the checkpoint's tensors that it is made of."""

    name: str
    sources: list[str]
    wide: bool  # in float32
    heads: int = 0  # whose rows are permuted; 0: as they are


class Weights:
    """The bfloat16 tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        self.headers: dict[str, tuple[int, dict[str, dict[str, list[int]]]]] = {}

    def _entry(self, name: str) -> tuple[int, dict[str, list[int]]]:
        file = self.files[name]
        if file not in self.headers:
            with open(self.folder / file, "rb") as source:
                (size,) = struct.unpack("<Q", source.read(8))
                self.headers[file] = (8 + size, json.loads(source.read(size)))
        base, header = self.headers[file]
        return base, header[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)[1]["shape"])

    def read(self, name: str) -> np.ndarray:
        """The tensor as uint16."""
        base, entry = self._entry(name)
        begin, end = entry["data_offsets"]
        data = np.fromfile(self.folder / self.files[name], np.uint16, (end - begin) // 2, offset=base + begin)
        return data.reshape(entry["shape"])


def pieces(config: dict[str, int], family: str, names: set[str]) -> list[Piece]:
    """The tensors of the GGUF file, in the order of a forward pass."""
    permuted = ARCHITECTURES[family] == ROPE_OF_NEIGHBOURS
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if permuted else {}
    found = [Piece("token_embd.weight", ["model.embed_tokens.weight"], wide=False)]
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        for part, name in LAYER.items():
            if ours + name + ".weight" in names:
                source = [ours + name + ".weight"]
                found.append(Piece(f"{theirs}{part}.weight", source, part.endswith("norm"), heads.get(part, 0)))
        if family in EXPERTS:
            count = config.get("num_local_experts") or config["num_experts"]
            found.append(Piece(f"{theirs}ffn_gate_inp.weight", [f"{ours}{ROUTERS[family]}.weight"], wide=True))
            for part, name in EXPERTS[family].items():
                sources = [f"{ours}{name.format(e)}.weight" for e in range(count)]
                found.append(Piece(f"{theirs}ffn_{part}_exps.weight", sources, wide=False))
    return [
        *found,
        Piece("output_norm.weight", ["model.norm.weight"], wide=True),
        Piece("output.weight", ["lm_head.weight"], wide=False),
    ]


def permute_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix reordered from transformers' halves to llama.cpp's interleaved rotary pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensor_of(piece: Piece, weights: Weights) -> np.ndarray:
    """The bytes of a piece: float32 or, as uint16, bfloat16."""
    if len(piece.sources) == 1:
        data = weights.read(piece.sources[0])
    else:
        data = np.empty((len(piece.sources), *weights.shape(piece.sources[0])), np.uint16)
        for slot, name in zip(data, piece.sources, strict=True):
            slot[:] = weights.read(name)
    if piece.heads:
        data = permute_heads(data, piece.heads)
    if piece.wide:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(data)


def write_gguf(folder: Path, out: Path) -> None:
    """Write the weights of `folder` as a BF16 GGUF file."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    family, weights = config["model_type"], Weights(folder)
    writer = gguf.GGUFWriter(str(out) + ".part", ARCHITECTURES[family])
    add_sizes(writer, config, folder.name)
    add_vocabulary(writer, config["vocab_size"])
    written = pieces(config, family, set(weights.files))
    for piece in written:
        many = (len(piece.sources),) if len(piece.sources) > 1 else ()
        shape = many + weights.shape(piece.sources[0])
        kind = gguf.GGMLQuantizationType.F32 if piece.wide else gguf.GGMLQuantizationType.BF16
        dtype = np.dtype(np.float32 if piece.wide else np.uint16)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        writer.add_tensor_info(piece.name, shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in written:
        writer.write_tensor_data(tensor_of(piece, weights))
    writer.close()
    os.replace(str(out) + ".part", out)


def add_sizes(writer: object, config: dict[str, int], name: str) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def add_vocabulary(writer: object, size: int) -> None:
    """A sentencepiece-like vocabulary: the three specials, the 256 bytes that llama.cpp asks for, made-up words."""
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    tokens += [f"t{i}" for i in range(len(tokens), size)]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens[:size])
    writer.add_token_scores([0.0 if i < 259 else -float(i) for i in range(size)])
    writer.add_token_types(kinds[:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_copy(folder: Path) -> None:
    """FOLDER.gguf beside the folder, unless it is there."""
    out = folder.with_name(folder.name + ".gguf")
    if not out.exists():
        need_disk(out, sum(file.stat().st_size for file in folder.glob("*.safetensors")), out.name)
        write_gguf(folder, out)
    print(f"{out}: {gigabytes(out.stat().st_size)}")
