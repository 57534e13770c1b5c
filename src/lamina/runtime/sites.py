"""Where a weight stands in a model."""

from __future__ import annotations

from torch import nn

Site = tuple[nn.Module, str, bool]
"""module, attribute, whether it is a buffer"""
Sites = dict[str, list[Site]]
