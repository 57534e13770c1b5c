"""Speculative decoding: a draft proposes tokens, one pass of the target verifies them all."""
