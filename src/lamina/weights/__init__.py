"""The weights of a model: where each byte of them is stored, how it becomes a tensor, and where that stands."""
