"""Base models: the decoder, and where its weights come from.

- `decoder`: Llama, Mistral, Qwen2 and Qwen3 in plain PyTorch
- `gguf`: reading it from a GGUF file
"""
