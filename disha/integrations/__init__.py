"""Small bridges to other libraries. Each module imports its library; nothing else imports it.

- `accelerate`: states of its `Accelerator`
- `lightning`: checkpoints of its `Trainer`
- `transformers`: checkpoints of its `Trainer`
- `trl`: its trainers, with the trained model as their reference
- `engines`: what FSDP2 and DeepSpeed write of a model, for all of these
"""
