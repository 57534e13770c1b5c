"""The transformers side: the meta model, its traced schedule, binding, `AutoModel`."""

from lamina.model.auto import AutoModel, plan_model
from lamina.model.bench import bench_model

__all__ = ["AutoModel", "bench_model", "plan_model"]
