"""The transformers side: the meta model, its traced schedule, binding, loading."""

from lamina.model.auto import check_memory, load_model, plan_model, taken
from lamina.model.bench import bench_model

__all__ = ["bench_model", "check_memory", "load_model", "plan_model", "taken"]
