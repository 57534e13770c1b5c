"""The edge to transformers: what its documentation does not promise, each piece of it named once."""
