"""Writes a tiny random Llama, with any fields of its config and any tokenizer: for tests that are about no family.

For a model of each family there is ``helpers.families``. This module knows nothing of Lamina.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.families import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB

BYTES: tuple[str, ...] = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_llama(
    folder: Path,
    *,
    seed: int = 0,
    spread: float | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **fields: Any,
) -> Path:
    """Write a tiny random Llama, whose text does not end by itself, and give its folder.

    Args:
        spread: standard deviation of each matrix; None takes transformers' own, of which every logit is near zero.
        tokenizer: saved beside the model.
        fields: of the config, in place of the tiny ones.
    """
    if unknown := fields.keys() - LlamaConfig().to_dict().keys():
        raise TypeError(f"the config of a Llama has no {', '.join(sorted(unknown))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**_FIELDS | fields))
        for parameter in model.parameters():
            if spread is not None and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=spread)
    model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def letters(vocabulary: Sequence[str] = BYTES, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters, or all bytes; ``settings`` name special tokens, a template."""
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(vocabulary)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


def words(vocabulary: Sequence[str], unknown: str, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words between spaces; each other word is ``unknown``, one of them."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, **settings)
