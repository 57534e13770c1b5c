"""From the files of a checkpoint to the model's own transformers class, on tensors that are still on disk."""
