"""Reading an adapter whatever its form: what it is shows in the folder or the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disha.errors import AdapterFileError, AdapterIOError, ArgumentError
from disha.files.atomic import checked_path
from disha.files.contents import Contents, blocks_only, read_contents
from disha.files.header import AdapterHeader
from disha.files.json_files import read_json
from disha.files.tensors import explained
from disha.interop import lora, peft
from disha.interop.checkpoints import Checkpoint, base_shapes
from disha.interop.checkpoints.matching import refuse_tied
from disha.interop.peft_files import CONFIG_NAME
from disha.model import join

__all__ = ["Form", "Source", "read_source"]

Form = Literal["disha", "peft", "lora", "gguf"]

GGUF_MAGIC = b"GGUF"
FOLDERS: dict[str, Form] = {"MISS": "peft", "BONE": "peft", "LORA": "lora"}
"""PEFT's name of a method -> the form of a folder that holds an adapter of it."""


@dataclass(frozen=True)
class Source:
    """An adapter, and what it was read from.

    Attributes:
        path: the file or folder.
        form: what that is.
        contents: the adapter.
    """

    path: Path
    form: Form
    contents: Contents

    @property
    def header(self) -> AdapterHeader:
        """What describes the adapter."""
        return self.contents[0]


def form_of(path: Path) -> Form:
    """Return what a file or folder is, by its first bytes or by its configuration.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: a folder that holds no adapter, or one of another method.
    """
    if not path.is_dir():
        with explained(path), open(path, "rb") as file:
            return "gguf" if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC else "disha"
    if not (path / CONFIG_NAME).exists():
        raise AdapterIOError(
            f"{path} is a folder without {CONFIG_NAME}; name an adapter file, or a folder that "
            "PEFT has saved"
        )
    method = read_json(path / CONFIG_NAME).get("peft_type")
    if not isinstance(method, str) or method not in FOLDERS:
        raise AdapterFileError(
            f"{path} holds an adapter of peft_type {method!r}; read are {', '.join(FOLDERS)}"
        )
    return FOLDERS[method]


def read_source(path: Path, base: Checkpoint | None, *, also_train: bool) -> Source:
    """Return the adapter in a file or a folder.

    Args:
        path: an adapter file of ours; or a folder that PEFT has saved: MiSS, Bone, or a LoRA that
            is a Bone adapter.
        base: the base checkpoint, which tells what a folder of MiSS or Bone does not.
        also_train: also take the parameters saved beside the blocks.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it holds no valid adapter, or not one for that base.
        ConversionError: a LoRA that is no Bone adapter.
        ArgumentError: there is no base, and it takes one; or it is GGUF, which is not read.
    """
    path = checked_path(path)
    form = form_of(path)
    if form == "gguf":
        raise ArgumentError(
            f"{path} is GGUF, which is written and not read; convert what it was made from"
        )
    if form == "disha":
        contents: Contents = read_contents(path, also_train=also_train)
    elif form == "lora":
        contents = lora.read_lora(path, also_train=also_train)
        if base is not None:
            refuse_tied(base, path, contents[0].also_train)
    else:
        contents = _from_peft(path, base, also_train)
    return Source(path, form, contents if also_train else blocks_only(*contents))


def _from_peft(path: Path, base: Checkpoint | None, also_train: bool) -> Contents:
    folder = peft.read_folder(path)
    if base is None:
        raise ArgumentError(
            f"{path} does not say how large the inputs of its layers are, and the base does; pass "
            "--base CHECKPOINT"
        )
    names = [*(join(name, "weight") for name in folder.blocks), *folder.beside]
    contents = peft.contents_of(folder, base_shapes(base, names), also_train=also_train)
    refuse_tied(base, path, contents[0].also_train)
    return contents
