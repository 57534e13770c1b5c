"""The transformers side: the meta model, its traced schedule, binding, `AutoModel`."""

from lamina.model.auto import AutoModel, plan_model

__all__ = ["AutoModel", "plan_model"]
