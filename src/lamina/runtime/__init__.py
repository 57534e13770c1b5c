"""A plan, executed: what is asked is loaded, weights are bound while the model runs, passes are counted."""
