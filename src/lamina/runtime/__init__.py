"""A plan, executed: weights are loaded, bound, materialised and given back while the model runs."""
