"""What a decoding loop of our own, a draft and a continuous batch need of transformers."""
