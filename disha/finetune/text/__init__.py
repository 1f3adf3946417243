"""Text to token ids and back.

- `tokenizer`: tokenizers, from what model files say of them
"""
