"""Text to token ids and back.

- `tokenizer`: the one kind of tokenizer that the rest of the command knows
- `from_folder`, `from_gguf`, `adopted`: where tokenizers come from
- `templates`: what surrounds a query to make a prompt of it
- `chat`: conversations through the model's own chat template
- `jinja`: that template's language, run inside bounds
"""
