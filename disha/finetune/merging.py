"""Writes a base model with an adapter merged into it, as a folder that loads like the base.

Weights are merged one after another, where the folder stores them as the model has them, or stores
experts one by one. For some models, transformers splits or renames other weights as it loads them.
Such a model is loaded as a whole, merged, and saved in the form that it had.
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import disha
from disha.files import write_folder
from disha.finetune.adapting import refusing_other_base
from disha.finetune.errors import SettingsError, UnsupportedModelError
from disha.finetune.models.families import FAMILIES
from disha.finetune.models.with_transformers import open_with_transformers, save

__all__ = ["merge_into_base"]


def merge_into_base(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    also_train: bool = True,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: Any = None,
) -> disha.interop.checkpoints.MergedCheckpoint:
    """Write a copy of a base model with an adapter merged into its weights.

    The arguments are those of `disha.interop.checkpoints.merge_into_checkpoint`.

    Raises:
        DishaError: the two do not fit together, a file can't be used, or transformers is needed and
            not installed.
    """
    try:
        return disha.interop.checkpoints.merge_into_checkpoint(
            base,
            adapter,
            out,
            also_train=also_train,
            scale=scale,
            dtype=dtype,
            force=force,
            overwrite=overwrite,
            progress=progress,
        )
    except disha.AdapterFileError:
        checkpoint = disha.interop.checkpoints.open_checkpoint(base)
        if not _is_converted(checkpoint, adapter):
            raise
    if out.suffix == ".safetensors":
        raise SettingsError(
            f"{base} stores some of the adapter's layers under other names or in other parts, so "
            f"the merged model must be a folder; name one in place of {out}"
        )
    missing = UnsupportedModelError(
        f"{base} stores some of the adapter's layers under other names or in other parts, and "
        "transformers, which converts them, is not installed; run: pip install "
        "'disha-torch[transformers]'"
    )
    opened = open_with_transformers(base, checkpoint.config(), missing)
    # Merged in float32, so that a weight is rounded once to another dtype.
    model = opened.load_model("auto" if dtype is None else torch.float32, torch.device("cpu"))
    names = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", disha.AdapterFileWarning)
        with nullcontext() if force else refusing_other_base():
            disha.load_adapter(model, adapter, also_train=also_train)
    if scale is not None:
        disha.set_adapter_scale(model, scale)
    disha.merge_adapters(model)
    model.to(dtype)
    state = model.state_dict()
    others, left_out = checkpoint.other_files()
    if dtype is not None or "quantization_config" in checkpoint.config():
        others.pop("config.json", None)
    with write_folder(out, overwrite=overwrite) as folder:
        save(model, {name: state[name] for name in names}, folder)
        for name, source in others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    written = disha.interop.checkpoints.open_checkpoint(out)
    header = disha.inspect_adapter(adapter)
    return disha.interop.checkpoints.MergedCheckpoint(
        path=out,
        layers=tuple(layer.name for layer in header.layers),
        replaced=tuple(header.also_train) if also_train else (),
        files=tuple(sorted(path.name for path in out.iterdir())),
        left_out=tuple(sorted(left_out)),
        nbytes=written.nbytes,
    )


def _is_converted(checkpoint: disha.interop.checkpoints.Checkpoint, adapter: Path) -> bool:
    """Return whether transformers converts weights of the adapter as it loads the base."""
    kind = checkpoint.config().get("model_type", FAMILIES)
    is_other = checkpoint.folder is not None and isinstance(kind, str) and kind not in FAMILIES
    return is_other and bool(
        disha.interop.checkpoints.verify_against(checkpoint.path, adapter).missing
    )
