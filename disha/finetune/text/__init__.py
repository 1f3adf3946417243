"""Text to token ids and back.

- `tokenizer`: the class `Tokenizer`, which the rest of the command uses
- `bounds`: checks that a tokenizer from a stranger takes bounded time and memory
- `from_folder`, `from_gguf`, `adopted`: make one from files, or from the user's own tokenizer
- `templates`: turn a query into a prompt by adding text around it
- `chat`: encodes conversations with the model's own chat template
- `jinja`: runs that template in a process with limits, whose main module is `rendering`
"""
