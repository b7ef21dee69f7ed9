"""Tokenizer files of every kind: tiktoken ranks, Hugging Face, SentencePiece, tekken, and our own folder."""
