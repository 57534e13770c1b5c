"""Text, pictures and sound on their way into a model, and its tokens on their way back into text.

Shared by whatever talks with people or clients. Nothing here imports torch or transformers: a model, its tokenizer and
its processor are handed in.
"""
