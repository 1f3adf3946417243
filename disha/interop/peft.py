"""Adapters in PEFT folders of MiSS (PEFT's current name for Bone) and of Bone (its former name).

The blocks have the same values and shapes in PEFT. What PEFT can't store is refused before anything
is written: layers other than `nn.Linear`, a scale, a different r in each layer, BAT with sizes that
r does not divide. Your own notes and the fingerprint of the base are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from disha.files.disk import PathLike, check_path
from disha.files.header import AdapterContents
from disha.files.saving import adapter_contents
from disha.interop.adapters import load_adapter as load
from disha.interop.low_rank import LoraLayer, LoraReport
from disha.interop.peft_format import (
    BAT,
    LINEAR,
    MISS_BLOCK,
    PREFIX,
    TILE,
    Converted,
    Surroundings,
    exact_targets,
    find_folder,
    read_config,
    refuse_to_write,
    surroundings_alone,
    surroundings_in_model,
)
from disha.layers.adapters import original_class
from disha.model.view import ModelView

__all__ = ["export", "find_folder", "load", "read_config"]

INIT_WEIGHTS = {"bone": True, BAT: BAT}
"""Method -> PEFT's word for it in `init_weights`, except for a tile."""

CANT_EXPRESS = "the adapter can't be written for PEFT's MiSS"
ELSE = "Write a LoRA (disha.interop.lora), which holds more, or merge (merge_adapters)"

# --- a model -------------------------------------------------------------------------------------


def export(model: nn.Module, folder: PathLike, adapter: str = "default") -> LoraReport:
    """Write an adapter as a folder that PEFT loads, with the same results.

    `PeftModel.from_pretrained(base, folder)` of PEFT 0.18 and later reads it. `target_modules`
    in the configuration selects the adapted layers and no other module of this model. Parameters
    that were trained with the adapter become `modules_to_save`. Bone is also exactly a
    LoRA, which `disha.interop.lora` writes. BAT is written with a dropout of 0, because PEFT's
    has none.

    The folder keeps the dtype of the blocks. PEFT casts blocks of 16 bits to float32 when it
    loads them, unless it gets `autocast_adapter_dtype=False`.

    With several processes, call it as you call `save_adapter`.

    Args:
        model: a model with adapters.
        folder: created if it does not exist. Other files in it stay, and each file that is
            replaced stays until the new ones are complete. If it has an `adapter.safetensors`,
            `load_adapter` reads that.
        adapter: the adapter's name. The folder does not contain it.

    Returns:
        A `LoraReport`. Every layer is exact, and has its r as the rank.

    Raises:
        AdapterIOError: the folder can't be written. What was there is unchanged, unless the message
            says that one of the two files is replaced already.
        ConversionError: PEFT's MiSS can't express the adapter; the message lists every reason.
        ArgumentError: there is no such adapter.
        AdapterStateError: as for `save_adapter`.

    Nothing is written if this raises.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = disha.interop.peft.export(model, folder)
        ...     config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
        ...     base = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        ...     disha.interop.peft.load(base, folder).matched
        ('0.bone_block',)
        >>> config["peft_type"], config["r"], config["target_modules"]
        ('MISS', 4, ['0'])
    """
    view = ModelView(model)
    action = f"export adapter {adapter!r} to PEFT"
    contents = adapter_contents(view, adapter, with_fingerprints=False)
    with view.ranks.fail_together(action):
        target = check_path(folder)
        place = surroundings_in_model(view, contents, _reason_if_unknown)
        config = _config_of(contents, place)
    converted = _convert(contents, place, config)
    with view.ranks.fail_together(action):
        return converted.write(target, view.ranks.writes)


def _reason_if_unknown(module: nn.Module) -> str | None:
    """Return why PEFT's MiSS can't adapt a module, or None if it can."""
    if isinstance(module, nn.Linear):
        return None
    return f"PEFT's MiSS adapts nn.Linear only, not {original_class(module).__name__}"


# --- without a model -----------------------------------------------------------------------------


def write_folder(folder: Path, contents: AdapterContents) -> None:
    """Write an adapter as `export` does, without the model; with its notes that PEFT knows."""
    unknown = [
        f"{name}: PEFT saves whole modules; load the file into the model and export from there"
        for name in contents.also_train
    ]
    place = surroundings_alone(contents, unknown)
    _convert(contents, place, _config_of(contents, place)).write(folder)


def _config_of(contents: AdapterContents, place: Surroundings) -> dict[str, Any]:
    """Return PEFT's configuration. Raise if PEFT's MiSS can't express the adapter."""
    config = contents.config
    problems = _reasons_against_miss(contents)
    refuse_to_write(CANT_EXPRESS, problems + place.problems, ELSE)
    init_weights: object = TILE
    if config.r_out is None:
        init_weights = INIT_WEIGHTS[config.method]
    return place.fields(exact_targets(contents.names, place.modules)) | {
        "init_weights": init_weights,
        "mini_r": config.r_out or 1,
        "miss_dropout": 0.0 if config.method == BAT else config.dropout,  # PEFT's BAT has none
        "peft_type": "MISS",
        "r": contents.layers[0].r,
    }


def _convert(contents: AdapterContents, place: Surroundings, config: dict[str, Any]) -> Converted:
    """Return an adapter as MiSS. Collective if the model is sharded."""
    others = place.copies()
    tensors = {PREFIX + name: tensor for name, tensor in others.items()}
    layers = []
    for record in contents.layers:
        tensors[PREFIX + record.name + MISS_BLOCK] = contents.tensors[record.key]
        layers.append(LoraLayer(record.name, record.method, record.r, record.r, 0.0))
    return Converted(config, tensors, tuple(layers), tuple(others))


def _reasons_against_miss(contents: AdapterContents) -> list[str]:
    """Return a line for each reason why PEFT's MiSS can't express an adapter."""
    method = contents.config.method
    problems = []
    if method not in INIT_WEIGHTS:
        problems.append(f"PEFT's MiSS knows {' and '.join(INIT_WEIGHTS)}, not {method}")
    for layer in contents.layers:
        name = layer.name or "(the model)"
        r = layer.r
        if layer.layout != LINEAR:
            problems.append(
                f"{name}: the layout of this weight is {layer.layout.pattern!r}, not 'out in'"
            )
        if layer.outputs:
            problems.append(f"{name}: PEFT's MiSS adapts all rows of a weight, not some of them")
        problems += [f"{name}: PEFT's MiSS would leave {tied} without it" for tied in layer.tied]
        if layer.scale != 1.0:
            problems.append(f"{name}: PEFT's MiSS has no scale (see combine_adapters)")
        if method == BAT and (layer.in_features % r or layer.out_features % r):
            problems.append(f"{name}: PEFT's BAT needs an r that divides both sizes, not {r}")
    sizes = sorted({layer.r for layer in contents.layers})
    if len(sizes) > 1:
        problems.append(f"PEFT's MiSS has one r, this has {sizes} (see combine_adapters)")
    return problems
