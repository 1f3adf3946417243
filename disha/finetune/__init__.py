"""Fine-tuning with adapters: ``disha finetune``, ``disha generate`` and ``disha evaluate``.

Needs the extra ``finetune``. Everything here uses the library through ``import disha``, as a
user's program would. From bottom to top:

- `settings`: what the commands can be told, which are their flags
- `stopping`: signals that ask the process to stop
- `models`: the built-in decoder, and where weights come from
- `text`: tokenizers, templates, chats
- `data`: from files of rows to batches
- `training`: from batches to a trained adapter, on one process or several
- `base_model`, `inputs`: the inputs of a run
- `adapting`: a model with its adapter, and without it
- `generation`, `answering`: ``disha generate``
- `evaluating`: ``disha evaluate``
- `progress`, `metrics`, `report`: what a run prints, records, and writes at its end
- `course`: training from the first to the last step
- `preview`, `verification`: ``--dry_run`` and ``--verify``
- `command`: ``disha finetune``
"""
