"""Adapters on the Hugging Face Hub, by name: `user/repo`, or `user/repo@revision`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from disha.errors import AdapterIOError, MissingPackageError
from disha.files.disk import ADAPTER_NAME, PathLike, check_path

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", re.ASCII)

FILES = (
    *(ADAPTER_NAME, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
)
"""What is fetched of a repository: an adapter file or PEFT's two, and what commands read beside."""


def find_adapter(path: PathLike) -> Path:
    """Return where an adapter is on this disk, which is the path unless it names a repository.

    A name is one if nothing on this disk has it. The repository is then fetched into the cache of
    `huggingface_hub`, whose settings hold, such as `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`.

    Args:
        path: a path, or the name of a repository, perhaps with a revision: `user/repo@revision`.

    Raises:
        AdapterIOError: there is no such file here and no such repository, or it can't be reached.
        MissingPackageError: `huggingface_hub` is not installed.
    """
    path = check_path(path)
    name = NAME.fullmatch(path.as_posix())
    is_local = os.path.lexists(path) or path.suffix == ".safetensors" or path.parent.is_dir()
    if name is None or is_local:
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackageError(
            f"there is no file or folder {path}; to get it from the Hugging Face Hub, install "
            "huggingface_hub"
        ) from error
    repository, revision = name.groups()
    try:
        folder: Any = snapshot_download(repository, revision=revision, allow_patterns=[*FILES])
    except (OSError, ValueError) as error:  # of HTTP, of a name, or that it is offline
        reason = str(error).splitlines()[0]
        raise AdapterIOError(
            f"{path} is neither here nor on the Hugging Face Hub: {reason}; check the name and the "
            "connection"
        ) from error
    return Path(folder)
