"""Public names of transformers that other rooms use: only `lamina.hf` imports it."""

from __future__ import annotations

from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import LogitsProcessorList

__all__ = [
    "ContinuousBatchingConfig",
    "DynamicCache",
    "GenerationConfig",
    "LogitsProcessorList",
    "PreTrainedModel",
    "StaticCache",
    "StoppingCriteria",
    "StoppingCriteriaList",
]
