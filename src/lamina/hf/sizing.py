"""What a pass with images or sound takes: found by running it once without weights, on its own shapes.

Lengths of text are traced when a model is loaded. How large a picture is, into how many patches it is cut and where
in the text they go is known only when a pass brings it. The same classes then run with tensors that have no memory,
but for token ids, sizes and masks, whose values decide what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from lamina.fallbacks import cause
from lamina.hf.experts import standing_in
from lamina.hf.internals import cache_of, cached_tokens, silent
from lamina.hf.recorder import Memory, Recorder, weight_names
from lamina.hf.trace import WORKSPACE

MOST_VALUES = 1 << 16  # elements of a tensor that keeps its values
TOWERS = ("get_image_features", "get_video_features", "get_audio_features")
"""Methods by which transformers' `generate` runs a tower, ahead of the first pass."""

TEXT = ("inputs_embeds", "attention_mask", "decoder_inputs_embeds", "decoder_attention_mask", "labels")


def has_media(kwargs: Mapping[str, Any]) -> bool:
    """Whether there are images or sounds among the arguments of a pass."""
    given = (value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in TEXT)
    return any(value.is_floating_point() and value.dim() > 1 for value in given)


class Sizing:
    """Counts activations of passes with images or sound; each shape once.

    Args:
        model: which runs them; a copy of it without weights is made when the first one comes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._kind, self._config, self._dtype = type(model), model.config, model.dtype
        self._twin: PreTrainedModel | None = None
        self._known: dict[Any, int] = {}
        self.fallback: str | None = None

    def activations(self, kwargs: Mapping[str, Any], tower: str | None = None) -> int:
        """Bytes of activations and kernels' workspaces of a pass; 0 of one over text, and of a later one of a text.

        Where the model's own code asks for values that only a real pass has it is what was alive until there, which
        is behind the tower in most families; `fallback` then says so.

        Args:
            kwargs: of `forward`, or of the method.
            tower: name of the method that runs a tower alone.
        """
        if not has_media(kwargs) or cached_tokens(cache_of(kwargs)):
            return 0
        shapes = tuple((name, value.shape) for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        if (tower, shapes) not in self._known:
            self._known[tower, shapes] = self._count(kwargs, tower)
        return self._known[tower, shapes]

    def _count(self, kwargs: Mapping[str, Any], tower: str | None) -> int:
        peak = 0
        try:
            twin = self._model()
            memory = Memory(weight_names(twin).values())
            recorder = Recorder({}, memory, answering=True, mixed=True)
            inputs = {name: _light(value) for name, value in kwargs.items()}
            try:
                with torch.no_grad(), standing_in(twin), memory, recorder:
                    (twin if tower is None else getattr(twin.base_model, tower))(**inputs)
            finally:
                peak = memory.peak
        except Exception as error:  # any family may ask for values in its own way
            why = f"images and sound are counted up to where the pass asks for real numbers ({cause(error)})"
            self.fallback = self.fallback or why
        return int(WORKSPACE * peak)

    def _model(self) -> PreTrainedModel:
        if self._twin is None:
            config = copy.deepcopy(self._config)
            with torch.device("meta"), silent():
                self._twin = self._kind(config).to(self._dtype).eval()
        return self._twin


def _light(value: Any) -> Any:
    """An argument without memory: ids, sizes and masks keep their values, an empty cache is another one."""
    if isinstance(value, torch.Tensor):
        keeps = not value.is_floating_point() or value.numel() <= 1
        return value.to("cpu") if keeps and value.numel() <= MOST_VALUES else value.to("meta")
    if isinstance(value, Mapping):  # what an encoder gave
        return type(value)(**{name: _light(each) for name, each in value.items()})
    return copy.deepcopy(value)
