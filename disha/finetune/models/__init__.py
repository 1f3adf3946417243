"""Base models: the decoder, and where its weights come from.

From bottom to top:

- `rope`: rotary frequencies, plain and scaled
- `decoder`: Llama, Mistral, Qwen2 and Qwen3 in plain PyTorch
- `fields`: typed access to the keys that describe a model
- `families`: the supported architectures, and how to read their config.json
- `quantised`: linear layers in 8 and 4 bits
- `assembly`: builds a decoder from stored weights, in bounded memory
- `folder`, `gguf`: read a model from a Hugging Face folder, or from a GGUF file
- `checkpoint`: opens a model from either
- `hub_cache`: finds a model in the local cache of Hugging Face by its name
- `with_transformers`: any other language model, through the library transformers
- `factory`: any other model, made by the user's own function
"""
