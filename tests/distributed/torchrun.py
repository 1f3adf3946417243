"""`python -m tests.distributed.torchrun WORDS...`: run commands of torchrun, each as its words.

It reads them as torchrun does. The ranks are forks of this process, which has imported torch once.
"""

import runpy
import shlex
import sys

from torch.distributed.run import parse_args

from tests.distributed.__main__ import run_on_ranks


def run_script(path: str, arguments: list[str]) -> None:
    """Run a script as Python does."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401  # for all ranks

    for command in sys.argv[1:]:
        asked = parse_args(shlex.split(command))
        assert asked.nproc_per_node == "2", command
        if not run_on_ranks(run_script, asked.training_script, asked.training_script_args):
            sys.exit(f"failed: torchrun {command}")
