"""From batches to a trained adapter.

- `objectives`: the losses to minimise
- `loop`: the steps of training, and their learning rates
- `machine`: number formats of the machine, and errors when its memory runs out
- `layers`: gradient checkpointing and compilation, one layer at a time
- `parallel`: several processes, with DDP and FSDP2
- `checkpoints`: save training, so that it can resume exactly
- `evaluation`: the loss on rows that are not trained on
"""
