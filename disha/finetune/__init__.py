"""Fine-tuning with adapters, from one command: ``disha finetune``, and what comes after it.

Needs the extra ``finetune``. Everything here uses the library through ``import disha``, as a
user's program would. The rooms, from bottom to top:

- `settings`: every choice, which is a flag
- `models`: the decoder, and where weights come from
- `text`: tokenizers, templates, chats
- `data`: from files of rows to batches
- `training`: from batches to a trained adapter, on one process or several, to the end or again

and what puts them together:

- `base_model`, `inputs`: what a run starts from
- `adapting`: the adapter that goes into the model
- `estimate`, `preview`: what a run would take (``--dry_run``)
- `course`: training from first to last step, with `metrics`, `progress`, `interruption`
- `command`: the whole of ``disha finetune``, with `plots`, `report` and `verification`
- `generation`, `answering`: ``disha generate``; `evaluating`: ``disha evaluate``
"""
