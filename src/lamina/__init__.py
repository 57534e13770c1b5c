"""Run language models that are bigger than memory: the weights stay on disk and stream through a small window."""
