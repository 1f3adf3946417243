"""From batches to a trained adapter.

- `objectives`: what is minimised
- `loop`: the steps of training, and their learning rates
- `machine`: number formats of the machine, and running out of memory
- `layers`: gradient checkpointing and compilation, one layer at a time
- `parallel`: several processes, with DDP and FSDP2
- `checkpoints`: from which training goes on exactly
- `evaluation`: the loss on rows that are not trained on
"""
