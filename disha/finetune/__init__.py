"""Fine-tuning with adapters: ``disha finetune``, ``disha generate`` and ``disha evaluate``.

Needs the extra ``finetune``. Everything here uses the library through ``import disha``, as a
user's program would. From bottom to top:

- `errors`: what can go wrong
- `settings`: the settings of the commands, which are also their flags
- `stopping`: signals that ask the process to stop
- `hashing`: whether a file or a model is the same as before
- `models`: the built-in decoder, and where weights come from
- `text`: tokenizers, templates, chats
- `data`: from files of rows to batches
- `training`: from batches to a trained adapter, on one process or several
- `generation`: the tokens that continue a text
- `base_model`, `noted_base`: the base model of a run, and its note in an adapter file
- `adapting`, `merging`: a model with its adapter, without it, and merged
- `answering`, `conversation`: ``disha generate``
- `inputs`: the base model and the rows of a run
- `scales`, `evaluating`: ``disha evaluate``
- `folder_lock`: lets only one run write to an output folder
- `progress`: what a run prints
- `report`, `reports`, `metrics`: what it writes at its end, sends to other programs, and records
- `resuming`, `course`: training from the first to the last step
- `estimate`, `preview`, `verification`: ``--dry_run`` and ``--verify``
- `command`: ``disha finetune``
"""
