"""Sparse checkpoints of models that see, with the processors of the real ones: they prove memory, never speed.

    python benchmarks/vision_checkpoints.py .cache/bench/vision            # all of them, each in a folder of its own
    python benchmarks/vision_checkpoints.py .cache/bench/vision gemma3

The towers have their published width and a few of their layers; the text model is small. Processors are files, as the
hub has them, and none needs torchvision.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import split_into_shards, write_folder
from report import run_main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

WORDS = 8_192  # the vocabulary; its first tokens are the special ones
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<image>", "<video>", "<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|image|>", "<|video|>"),
    *("<|python_tag|>", "<IMG_CONTEXT>", "<img>", "</img>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    *("<|begin_of_image|>", "<|end_of_image|>"),
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
    *(f"TILE_{tile + 1}" for tile in range(12)),
]
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": WORDS}
TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 8192}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 6, "num_attention_heads": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def token(text: str) -> int:
    return SPECIAL.index(text)


@dataclass(frozen=True)
class Seeing:
    """One family: fields of its config, of its text and vision configs, and of its processor's files."""

    processor: str
    images: str  # the image processor
    image_token: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    processor_fields: Mapping[str, Any] = field(default_factory=dict)
    image_fields: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)  # names that the tokenizer has for special tokens

    def marks(self) -> dict[str, int]:
        """The id of the token that stands for a piece of a picture, by both names that configs have for it."""
        return dict.fromkeys(("image_token_id", "image_token_index"), token(self.image_token))


def _square(pixels: int) -> dict[str, Any]:
    return {"size": {"height": pixels, "width": pixels}, "do_resize": True}


def _qwen(processor: str, **vision: Any) -> Seeing:
    marks = {"video_token_id": token("<|video_pad|>"), "vision_start_token_id": token("<|vision_start|>")}
    marks |= {"vision_end_token_id": token("<|vision_end|>")}
    patch = {"patch_size": vision.get("patch_size", 14), "merge_size": 2, "temporal_patch_size": 2}
    patch |= {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
    return Seeing(
        processor,
        "Qwen2VLImageProcessor",
        "<|image_pad|>",
        marks,
        {"rope_parameters": ROPE},
        vision,
        image_fields=patch,
    )


_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
FAMILIES: dict[str, Seeing] = {
    "aya_vision": Seeing(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessor",
        "<|IMG_PATCH|>",
        {"downsample_factor": 2},
        vision=SIGLIP | {"image_size": 364},
        processor_fields={"patch_size": 28, "img_size": 364},
        image_fields=_square(364) | {"crop_to_patches": True, "max_patches": 12},
    ),
    "gemma3": Seeing(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        "<image_soft_token>",
        {"mm_tokens_per_image": 256, "boi_token_index": token("<start_of_image>"), "eoi_token_index": 7},
        vision=SIGLIP | {"image_size": 896, "patch_size": 14},
        processor_fields={"image_seq_length": 256},
        image_fields=_square(896),
        tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "glm4v": Seeing(
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "<|image|>",
        {"video_token_id": token("<|video|>"), "image_start_token_id": token("<|begin_of_image|>")}
        | {"image_end_token_id": token("<|end_of_image|>")},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        {"depth": 4, "hidden_size": 1536, "num_heads": 12, "intermediate_size": 4096, "out_hidden_size": 1024},
        image_fields={"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}},
    ),
    "idefics3": Seeing(
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        "<image>",
        {"scale_factor": 2},
        vision=SIGLIP | {"image_size": 364, "patch_size": 14},
        processor_fields={"image_seq_len": 169},
        image_fields={"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}},
    ),
    "internvl": Seeing(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        "<IMG_CONTEXT>",
        {"downsample_ratio": 0.5},
        vision=CLIP | {"image_size": [448, 448], "patch_size": [14, 14]},
        processor_fields={"image_seq_length": 256},
        image_fields=_square(448) | {"crop_to_patches": True, "max_patches": 12},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "llava": Seeing(
        "LlavaProcessor",
        "CLIPImageProcessor",
        "<image>",
        vision=CLIP | {"image_size": 896, "patch_size": 14},
        processor_fields=_LLAVA,
        image_fields={"size": {"shortest_edge": 896}, "crop_size": {"height": 896, "width": 896}},
    ),
    "llava_next": Seeing(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        "<image>",
        {"image_grid_pinpoints": _GRID},
        vision=CLIP | {"image_size": 336, "patch_size": 14},
        processor_fields=_LLAVA,
        image_fields={"image_grid_pinpoints": _GRID, "size": {"shortest_edge": 336}}
        | {"crop_size": {"height": 336, "width": 336}},
    ),
    "llava_onevision": Seeing(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        "<image>",
        {"video_token_index": token("<video>"), "vision_aspect_ratio": "anyres_max_9"},
        vision=SIGLIP | {"image_size": 384, "patch_size": 14},
        processor_fields={"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
        image_fields=_square(384),
    ),
    "mllama": Seeing(
        "MllamaProcessor",
        "MllamaImageProcessor",
        "<|image|>",
        text={"cross_attention_layers": [1, 4]},
        vision={"hidden_size": 1280, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 16}
        | {"intermediate_size": 5120, "image_size": 560, "intermediate_layers_indices": [1, 2], "patch_size": 14}
        | {"vision_output_dim": 1280 * 3, "max_num_tiles": 4}
        | {"supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]},
        image_fields=_square(560) | {"max_image_tiles": 4},
    ),
    "paligemma": Seeing(
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        "<image>",
        {"projection_dim": 1024},
        {"num_image_tokens": 4096},
        SIGLIP | {"image_size": 896, "patch_size": 14, "projection_dim": 1024},
        image_fields=_square(896) | {"image_seq_length": 4096},
        tokens={"image_token": "<image>"},
    ),
    "qwen2_vl": _qwen("Qwen2VLProcessor", depth=6, embed_dim=1280, hidden_size=1024, num_heads=16),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor", depth=6, hidden_size=1280, out_hidden_size=1024, fullatt_block_indexes=[2, 5]
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor", depth=6, patch_size=16, out_hidden_size=1024, deepstack_visual_indexes=[1, 3, 4]
    ),
}

TOKENS = {
    "aya_vision": 1704,
    "gemma3": 260,
    "glm4v": 1026,
    "idefics3": 2910,
    "internvl": 1284,
    "llava": 4098,
    "llava_next": 2930,
    "llava_onevision": 7373,
    "mllama": 4,
    "paligemma": 4099,
    "qwen2_5_vl": 1026,
    "qwen2_vl": 1026,
    "qwen3_vl": 786,
}
"""Tokens that a picture of 896 pixels a side is for each."""


def _write_processor(folder: Path, family: Seeing) -> None:
    words = SPECIAL + [f"w{number}" for number in range(len(SPECIAL), WORDS)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(SPECIAL)
    kept = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=plain, extra_special_tokens=dict(family.tokens), **kept)
    made.save_pretrained(folder)
    files = {
        "processor_config.json": {"processor_class": family.processor, **family.processor_fields},
        "preprocessor_config.json": {
            "processor_class": family.processor,
            "image_processor_type": family.images,
            **family.image_fields,
        },
    }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=1))


def write_seeing(folder: Path, name: str) -> int:
    """Write the checkpoint of a family with its processor; the bytes of weights that it stands for."""
    family = FAMILIES[name]
    whole = AutoConfig.for_model(name).to_dict()
    text = whole["text_config"] | TEXT | family.text
    for key in ("layer_types", "rope_parameters", "rope_scaling"):
        if key not in family.text:
            text.pop(key, None)  # made anew for these sizes
    fields = {"text_config": text, "vision_config": whole["vision_config"] | family.vision}
    config = AutoConfig.for_model(name, **(family.marks() | dict(family.config) | fields))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tied = model.all_tied_weights_keys
    tensors = {name: tuple(t.shape) for name, t in model.named_parameters(remove_duplicate=False) if name not in tied}
    written = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    stood_for = write_folder(folder, written, tensors, split_into_shards(tensors), None)
    _write_processor(folder, family)
    return stood_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    given = parser.parse_args()
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"no family named {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    for name in given.families or FAMILIES:
        folder = given.folder / name
        if not (folder / "config.json").exists():
            print(f"{folder}: {write_seeing(folder, name) / 1e9:.2f} GB of weights (sparse)")


if __name__ == "__main__":
    run_main(main)
