"""From batches to a trained adapter.

- `objectives`: what is minimised
- `evaluation`: the same on rows that are not trained on
- `loop`: the steps of training
"""
