"""Fine-tuning a language model with adapters, from one command: ``disha finetune``.

Needs the extra ``finetune``. Everything here uses the library through ``import disha``, as a
user's program would.
"""
