"""From batches to a trained adapter.

- `objectives`: what is minimised
- `schedule`: the learning rates
- `loop`: the steps of training
- `precision`, `memory`: bfloat16 and TF32, and what to lower where memory does not suffice
- `layers`: gradient checkpointing and compilation, one layer at a time
- `parallel`: several processes, with DDP and FSDP2
- `checkpoints`: from which training goes on exactly
- `evaluation`: the loss on rows that are not trained on
"""
