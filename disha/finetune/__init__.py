"""`disha finetune`: a thin layer on `trl` that trains an adapter without code.

| module | what it holds |
|---|---|
| `flags` | how all commands read their flags |
| `names` | what its flags are called elsewhere |
| `arguments` | the flags of this one |
| `choices` | the settings that a run chooses by device and size |
| `source` | where a base is |
| `tokenizer` | its tokenizer, with what an adapter notes |
| `base` | the base model |
| `ranks` | what each rank of a run loads |
| `notes` | what an adapter file notes, and how it is loaded |
| `data` | the rows, as they are read, mixed and held out |
| `forms` | the form in which rows are trained |
| `templates` | a trial of the chat template that an adapter brings |
| `trainer` | trl's trainer, and what it shows |
| `train` | one run, from the flags to the saved adapter |
| `resuming` | what earlier runs left, and how a run goes on from a checkpoint |
| `forgetting` | how much an adapter raises the loss on text of its base |
| `report` | the proof that the adapter is sound, and the other files beside it |
| `merging` | a copy of the base with the adapter in its weights |
"""

import os
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run `disha finetune` with these words of a command line, and return the exit code."""
    from disha.finetune.names import translate

    words, told = translate(argv)  # a wrong name ends here, before a trainer is imported
    if os.environ.get("RANK", "0") == "0":
        print("".join(f"{line}\n" for line in told), end="", flush=True)
    from disha.finetune.arguments import parse_flags

    flags = parse_flags(words)  # help ends here
    from disha.finetune.train import run

    run(flags)
    return 0
