"""Base models: the decoder, and where its weights come from.

From bottom to top:

- `rope`: rotary frequencies, plain and scaled
- `decoder`: Llama, Mistral, Qwen2 and Qwen3 in plain PyTorch
- `fields`: typed access to the keys that describe a model
- `families`: what each architecture's config.json means
- `quantised`: linear layers in 8 and 4 bits
- `assembly`: a decoder from stored weights, in bounded memory
- `folder`, `gguf`: reading it from a Hugging Face folder, and from a GGUF file
- `checkpoint`: opening either
- `factory`: any other model, made by a function of the user's
"""
