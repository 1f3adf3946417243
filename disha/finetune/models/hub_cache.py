"""Models in the local cache of Hugging Face, by name, such as Qwen/Qwen3-0.6B.

    <cache>/models--Qwen--Qwen3-0.6B/refs/main          the commit that was downloaded last
    <cache>/models--Qwen--Qwen3-0.6B/snapshots/<commit> a folder with its files
    <cache>/models--Qwen--Qwen3-0.6B/blobs              their content; also `.incomplete` downloads

Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from disha.finetune.errors import CheckpointError

__all__ = ["located", "name_in_cache"]

NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


def located(path: Path) -> Path:
    """Return a path that exists, or the folder of the model of that name in the cache.

    If there is neither, the path is returned as it is.

    Args:
        path: a path, or a name such as Qwen/Qwen3-0.6B.

    Raises:
        CheckpointError: the model of that name is not complete.
    """
    name = path.as_posix()
    entry = _cache() / f"models--{name.replace('/', '--')}"
    if path.exists() or not NAME.fullmatch(name) or not entry.is_dir():
        return path
    try:
        commit = (entry / "refs" / "main").read_text(encoding="utf-8").strip()
        folder = entry / "snapshots" / Path(commit).name
        is_complete = (folder / "config.json").is_file() and not _unfinished(entry)
    except (OSError, ValueError):
        is_complete = False
    if not is_complete:
        raise CheckpointError(
            f"{name} is in the cache, {entry}, but its download is not complete; to complete it, "
            f"run: hf download {name}"
        )
    return folder


def name_in_cache(folder: Path) -> str | None:
    """Return the name of the model whose folder in the cache this is; None for any other folder."""
    entry = folder.absolute().parent.parent
    if folder.parent.name != "snapshots" or not entry.name.startswith("models--"):
        return None
    return entry.name.removeprefix("models--").replace("--", "/")


def _unfinished(entry: Path) -> bool:
    # A killed download leaves its part, even after another download has completed the file.
    parts = (entry / "blobs").glob("*.incomplete")
    return any(not part.with_name(part.name.split(".")[0]).exists() for part in parts)


def _cache() -> Path:
    """Return the folder of the cache, as huggingface_hub finds it."""
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{above}/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
