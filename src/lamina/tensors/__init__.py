"""Tensor subclasses that stand where a weight stands. torch only, no transformers."""
