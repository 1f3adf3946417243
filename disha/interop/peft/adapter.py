"""PEFT folders out of models and into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from disha.config import check_adapter_name
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import adapter_contents, load_contents
from disha.files.header import AdapterHeader
from disha.interop.folder import CONFIG_NAME
from disha.interop.peft.folder import (
    PeftFolder,
    contents_of,
    described,
    matching,
    not_expressible,
    read_folder,
    refuse_to_load,
    refuse_to_write,
    write_stored,
)
from disha.interop.peft.view import PeftView
from disha.interop.saved_modules import other_buffers
from disha.interop.targets import exact_targets
from disha.model import ModelView
from disha.state import LoadReport

__all__ = ["export", "load"]


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    dropout: float | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an adapter as a folder that PEFT loads, with the same results.

    `PeftModel.from_pretrained(base, folder)` of PEFT 0.18 and later takes it. The configuration
    names the adapted layers so that it selects them and no other module of this model, by the ends
    of their names or by a regex. Parameters that were trained beside the adapter become
    `modules_to_save`, or `bias`. Bone is also exactly a LoRA, which `disha.interop.lora` writes.

    PEFT casts blocks of 16 bits to float32 when it loads them, unless it is told
    `autocast_adapter_dtype=False`; the folder has them as they are.

    On several processes, call it as you call `save_adapter`.

    Args:
        model: a model with adapters.
        folder: made if it is not there. Other files in it stay, and each file that is replaced
            stays until the new ones are complete.
        adapter: the adapter's name; it is not written.
        dropout: what to write in place of the adapter's dropout.
        base_model_name_or_path: where PEFT's `AutoPeftModel` finds the base.
        task_type: PEFT's, `"CAUSAL_LM"` say.

    Raises:
        AdapterIOError: the folder can't be written; what was there is still there.
        ConversionError: PEFT's MiSS can't express it; the message lists everything that it lacks.
        ArgumentError: there is no such adapter, or `dropout` is out of range.
        AdapterStateError: as for `save_adapter`.

    Nothing is written whenever this raises.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.interop.peft.export(model, folder)
        ...     config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
        ...     base = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        ...     disha.interop.peft.load(base, folder).matched
        ('0.bone_block',)
        >>> config["peft_type"], config["r"], config["target_modules"]
        ('MISS', 4, ['0'])
    """
    view = ModelView(model)
    ranks, action = view.ranks(), f"export adapter {adapter!r} to PEFT"
    notes = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    with ranks.agreeing(action):
        view.require(adapter)
        target = checked_path(folder)
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        peft = PeftView(view)
        names = [layer.name for layer in header.layers]
        problems = not_expressible(header, dropout) + peft.obstacles_to_export(names)
        saved = peft.saved(header.also_train, names, tensors)
        refuse_to_write(f"adapter {adapter!r}", problems + list(saved.problems))
        config = described(header, dropout, exact_targets(names, peft.modules), saved, notes)
    with ranks.agreeing(action):
        if ranks.writes:
            write_stored(target, header, tensors, config, saved)


def load(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    also_train: bool = True,
    replace: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoadReport:
    """Load a PEFT folder of MiSS or of Bone into a model, with the results that it has in PEFT.

    Everything in `adapter_config.json` is honoured as PEFT does, or refused: the layers that it
    selects have to be those that the folder has blocks for. `modules_to_save` and `bias` become
    parameters trained beside the adapter. The dropout of a BAT is none, as PEFT's BAT has none.

    Args:
        model: the base model, or one that has other adapters.
        folder: the folder that PEFT's `save_pretrained` or `export` has written.
        adapter: the name that the adapter gets in this model.
        also_train: also set the parameters that the folder holds beside the blocks.
        replace: where the model has an adapter of that name, copy the folder's values into it.
        dtype: dtype of the blocks; the folder's by default.
        freeze: freeze all parameters that belong to no adapter, as `inject_adapters` does.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it is no valid folder of MiSS or Bone, or does not fit the model, or this
            library would compute something else with it than PEFT; the message lists everything.
        ArgumentError: the name is taken and `replace` is not set.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    The model is unchanged whenever this raises.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> base, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.ones(1, 8)
        >>> weights = base.state_dict()
        >>> model = disha.inject_adapters(base, "0", r=4, init="kaiming")
        >>> fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.interop.peft.export(model, folder)
        ...     _ = fresh.load_state_dict(weights)
        ...     print(disha.interop.peft.load(fresh, folder))
        1 keys fit
        >>> torch.equal(fresh(x), model(x))
        True
    """
    view = ModelView(model)
    with view.ranks().agreeing(f"load a PEFT folder as adapter {adapter!r}"):
        check_adapter_name(adapter)
        peft, found = PeftView(view), read_folder(folder)
        refuse_to_load(found.path, peft.obstacles_to_load(found.blocks) + _unlike(peft, found))
        rest = found.without(peft.buffers())
        header, tensors = contents_of(rest, peft.shape, also_train=also_train)
        header = _under_first_names(peft, found.path, header, tensors)
    tensors = {key: tensors[key] for key in header.tensors}
    return load_contents(
        view, found.path, header, tensors, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _unlike(view: PeftView, found: PeftFolder) -> list[str]:
    """Return what a folder and a model do not have alike, other than sizes."""
    targets, beside = found.config.targets(found.path), found.beside
    with matching(found.path):
        more = view.not_selected(targets, found.blocks)
    lacking = view.not_saved(found.config.modules_to_save, beside)
    return [
        *(f"{name}: {CONFIG_NAME} selects it, and there is no block for it" for name in more),
        *(f"{name}: modules_to_save asks for it, and it is not there" for name in lacking),
        *other_buffers(view.buffers(), beside),
    ]


def _under_first_names(
    view: PeftView, path: Path, header: AdapterHeader, tensors: Mapping[str, Tensor]
) -> AdapterHeader:
    """Return the header with each shared parameter once, under the name that it goes by."""
    problems, kept = [], []
    for name in header.also_train:
        first, *others = view.all_names(name)
        absent = [alias for alias in (first, *others) if alias not in tensors]
        if absent:
            problems.append(
                f"parameter {name}: the model shares it with {', '.join(absent)}, which PEFT "
                "leaves as it is; untie them first"
            )
        elif not torch.equal(tensors[first], tensors[name]):
            problems.append(
                f"parameter {name}: the model shares it with {first}, which has other values; "
                "untie them first"
            )
        elif first == name:
            kept.append(name)
    refuse_to_load(path, problems)
    keys = {layer.key for layer in header.layers} | set(kept)
    records = {key: record for key, record in header.tensors.items() if key in keys}
    return dataclasses.replace(header, also_train=tuple(kept), tensors=records)
