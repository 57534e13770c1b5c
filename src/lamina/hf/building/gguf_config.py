"""The config in the metadata of a GGUF file: what transformers makes of it, and what it leaves at a default."""

from __future__ import annotations

import inspect
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from lamina.checkpoint import Checkpoint
from lamina.checkpoint.gguf import MAGIC, GgufFile
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.hf.building.gguf_table import Architecture, fields_of, row_of
from lamina.hf.internals import GGUF_CONFIG_MAPPING, gguf_config_architectures, silent
from lamina.tensors.disk import TORCH_DTYPES

LONGEST_ARRAY = 1 << 16  # bytes; what a config needs is shorter, vocabularies and merges are longer
CAUSES = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError)
# What transformers 5.23 leaves at its default although the file says it: end of the metadata key, key of the config.
LEFT_OUT = (
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ("attention.key_length", "head_dim"),
)
PARTIAL = ("phi3", "stablelm", "nemotron")  # architectures that may rotate a part of each head only
UNREADABLE = ("gpt_oss",)  # of writers other than llama.cpp: experts' columns are rows in the file
# The models of 27 billion scale their attention by the whole width, which a file does not say; llama.cpp knows them
# by their layers as well.
SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_gguf_config(file: GgufFile, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config in a file's metadata, and the options that were not for it.

    Raises:
        UnsupportedError: transformers does not know the architecture.
        CheckpointError: the metadata lacks what a config needs.
        ImportError: the gguf package is missing.
    """
    if file.get("general.architecture") == "clip":
        raise UnsupportedError(
            f"{file.path} is the projector of a multimodal model (mmproj), not a model: give the GGUF file of the "
            "language model beside it"
        )
    if file.get("general.architecture") in UNREADABLE:
        raise UnsupportedError(f"{file.path} keeps its experts in a way that is not read here: use the safetensors")
    given = dict(options)
    if given.get("dtype", given.get("torch_dtype", "auto")) in ("auto", None):
        given.pop("torch_dtype", None)
        given["dtype"] = _own_dtype(file.checkpoint)
    table = file.checkpoint.tensors.get("token_embd.weight")
    if table is not None:
        given.setdefault("vocab_size", table.shape[0])
    if (row := row_of(file)) is not None:
        config, unused = _from_table(file, row, given)
        config.name_or_path = file.path
        return config, unused
    try:
        with tempfile.TemporaryDirectory() as folder, silent():
            path = _without_vocabulary(file, folder)
            config, unused = AutoConfig.from_pretrained(
                os.path.dirname(path), gguf_file=os.path.basename(path), return_unused_kwargs=True, **given
            )
    except CAUSES as error:
        raise refused(file, error) from error
    unused.pop("gguf_file", None)
    config = _completed(config, file, options)
    config.name_or_path = file.path
    return config, unused


def _from_table(file: GgufFile, row: Architecture, given: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of an architecture that transformers does not map, and the options that were not for it."""
    own = {"model_type": row.model_type, **fields_of(file, row)}
    try:
        kind = type(AutoConfig.for_model(own["model_type"]))
    except ValueError as error:  # transformers is older than the architecture
        raise refused(file, error) from error
    kept = inspect.signature(kind.__init__).parameters.keys() | set(dir(kind))
    if "head_dim" not in kept and own.get("head_dim", 0) * own["num_attention_heads"] == own["hidden_size"]:
        own.pop("head_dim")
    own["tie_word_embeddings"] = "output.weight" not in file.checkpoint.tensors
    for name in ("bos", "eos", "padding"):
        own[f"{name.replace('padding', 'pad')}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id")
    config, unused = kind.from_dict(own, return_unused_kwargs=True, **given)
    if not {"rope_parameters", "rope_scaling"} & given.keys():
        _complete_rope(config, file)
    return config, unused


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    matrices = [entry for entry in checkpoint.tensors.values() if len(entry.shape) > 1]
    stored = {"BF16" if entry.encoding else entry.dtype for entry in matrices} - {"F32"}
    return (
        TORCH_DTYPES[stored.pop()] if stored in ({"F16"}, {"BF16"}) else (torch.bfloat16 if stored else torch.float32)
    )


def refused(file: GgufFile, error: Exception) -> LaminaError:
    """What to say when transformers cannot read a file."""
    architecture, text = file.get("general.architecture"), " ".join(str(error).split())
    if architecture is None:
        return CheckpointError(f"{file.path} does not say which architecture it has: it is no language model")
    if any(words in text for words in ("not supported", "Unknown gguf model_type", "not recognize")):
        return UnsupportedError(f"transformers does not know GGUF files of the architecture {architecture!r}")
    return CheckpointError(
        f"cannot read the config in {file.path} ({architecture}): {type(error).__name__} {text[:200]}"
    )


def _without_vocabulary(file: GgufFile, folder: str) -> str:
    """A GGUF file with the same short metadata and tensor names, and nothing else.

    The `gguf` package makes several objects of every word of a vocabulary: 0.5 GB and 6 s for 150,000 words.
    """
    if file.get("general.architecture") in gguf_config_architectures():
        return file.path  # read by transformers' own reader, which has no such cost
    with open(file.path, "rb") as source:
        kept = []
        for key, field in file.fields.items():
            short = field.length <= LONGEST_ARRAY and not key.startswith(("general.alignment", "split."))
            if short or not field.is_array:
                source.seek(field.offset)
                kept.append(source.read(field.length))
    names = [name.encode() for name in file.checkpoint.tensors]
    described = [struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names]
    head = MAGIC + struct.pack("<IQQ", 3, len(names), len(kept))
    path = os.path.join(folder, "config.gguf")
    with open(path, "wb") as target:
        target.write(head + b"".join(kept) + b"".join(described) + bytes(64))
    return path


def _completed(config: PreTrainedConfig, file: GgufFile, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The config with what is in the file and not in it."""
    architecture = str(file.get("general.architecture"))
    if architecture == "llama" and (count := file.get("llama.expert_count")):
        config = _as_mixtral(config, count, file.get("llama.expert_used_count"))
    read = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(config.model_type, {})
    for ending, key in LEFT_OUT:
        value = file.get(f"{architecture}.{ending}")
        if value is not None and ending not in read and key not in options and hasattr(config, key):
            setattr(config, key, value)
    if "output.weight" in file.checkpoint.tensors:
        config.tie_word_embeddings = False  # stored twice, and quantised in two ways
    if (architecture, config.get_text_config().num_hidden_layers) in SCALED_BY_WIDTH:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if not {"rope_parameters", "rope_scaling"} & options.keys():
        _complete_rope(config, file)
    return config


def _as_mixtral(config: PreTrainedConfig, experts: object, used: object) -> PreTrainedConfig:
    """The config of a Mixtral, which is a llama with experts to llama.cpp."""
    own = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    own |= {"num_local_experts": experts, "num_experts_per_tok": used}
    return AutoConfig.for_model("mixtral", **own | {"dtype": config.dtype})


def _complete_rope(config: PreTrainedConfig, file: GgufFile) -> None:
    """Have a config say how positions are rotated, where it says anything of that."""
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        own = _rope(file, config, rope.get("full_attention", rope))
        config.rope_parameters = {**rope, "full_attention": own} if "full_attention" in rope else own


def _rope(file: GgufFile, config: PreTrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated, of which transformers takes the base only.

    llama.cpp writes Llama 3's and Phi 3's divisors of the frequencies as tensors, other ways under `rope.scaling`.
    """
    architecture, own = file.get("general.architecture"), dict(rope)
    if own.get("rope_type", "default") != "default":
        return own
    rotated = file.get(f"{architecture}.rope.dimension_count")
    if architecture in PARTIAL and isinstance(rotated, int):
        heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        own["partial_rotary_factor"] = rotated / heads
    scaling = {
        key.rpartition(".")[2]: file.get(key) for key in file.fields if key.startswith(f"{architecture}.rope.scaling.")
    }
    length = scaling.get("original_context_length")
    if length and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = length  # Phi 3's config takes it from there
    return own | _lengthened(file, config, own, scaling)


def _lengthened(
    file: GgufFile, config: PreTrainedConfig, rope: Mapping[str, Any], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    """How rotations are scaled for long texts, as a config says it."""
    length = scaling.get("original_context_length")
    known = {"original_max_position_embeddings": length} if length else {}
    short, long = (_numbers(file, f"rope_factors_{which}.weight") for which in ("short", "long"))
    if short and long:
        own = {"rope_type": "longrope", "short_factor": short, "long_factor": long, **known}
        return own | ({"attention_factor": scaling["attn_factor"]} if "attn_factor" in scaling else {})
    if divisors := _numbers(file, "rope_freqs.weight"):
        return _divided(divisors, rope["rope_theta"], config)
    if scaling.get("type") in ("linear", "yarn") and scaling.get("factor"):
        return {"rope_type": scaling["type"], "factor": scaling["factor"], **known}
    return {}


def _divided(divisors: list[float], base: float, config: PreTrainedConfig) -> dict[str, Any]:
    """Rotations whose frequencies are divided: Llama 3's way where it gives these divisors, else one by one."""
    if all(divisor == 1 for divisor in divisors):
        return {}
    factor = max(divisors)
    low, high, length = LLAMA3.values()
    for index, divisor in enumerate(divisors):
        wave = 2 * math.pi * base ** (index / len(divisors))
        smooth = min(max((length / wave - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            most = config.max_position_embeddings
            same = {"short_factor": divisors, "long_factor": divisors, "original_max_position_embeddings": most}
            return {"rope_type": "longrope", "attention_factor": 1.0, **same}
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _numbers(file: GgufFile, name: str) -> list[float]:
    """The elements of a small fp32 tensor; none where there is no such tensor."""
    entry = file.checkpoint.tensors.get(name)
    if entry is None or entry.dtype != "F32" or entry.encoding is not None or entry.extent.length > LONGEST_ARRAY:
        return []
    with open(entry.extent.file, "rb") as source:
        source.seek(entry.extent.offset)
        raw = source.read(entry.extent.length)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))
