"""From batches to a trained adapter.

From bottom to top:

- `machine`: number formats of the machine, and errors when its memory runs out
- `layers`: gradient checkpointing and compilation, one layer at a time
- `cross_entropy`: the loss over a large vocabulary, in little memory
- `objectives`: the losses to minimise
- `parallel`: several processes, with DDP and FSDP2
- `optimizers`: the optimizers, and how much memory each takes
- `loop`: the steps of training, and their learning rates
- `checkpoints`: save training, so that it can resume exactly
- `evaluation`: the loss on rows that are not trained on
"""
