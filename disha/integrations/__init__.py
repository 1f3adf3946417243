"""Small bridges to other libraries. Each module imports its library; nothing else imports it.

- `transformers`: checkpoints of its `Trainer`
"""
