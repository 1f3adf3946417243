"""`adapter_config.json` of PEFT's MiSS and of Bone, its earlier name: read and written.

Every field means what it means in PEFT (0.21; 0.18 for Bone). An unknown field that has a value is
refused, because it may change what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disha.interop.peft_files import Fields

__all__ = ["BAT", "INIT_WEIGHTS", "NOTES", "PeftConfig", "config_of", "fields_of"]

MISS, BONE = "MISS", "BONE"

BAT = "bat"
"""The method for which PEFT has no padding and no dropout."""

INIT_WEIGHTS: Mapping[str, bool | str] = {"bone": True, BAT: BAT}
"""Method -> PEFT's word for it in `init_weights`; a tile is `"mini"`."""

NOTES = ("base_model_name_or_path", "revision", "task_type")
"""Fields that say where an adapter belongs. They do not change what it computes."""

_IGNORED = (
    *("auto_mapping", "inference_mode", "peft_version", "runtime_config"),
    *("exclude_modules", "layers_pattern", "layers_to_transform"),
)
"""Fields that PEFT sets or drops when it loads, and fields that select layers."""


@dataclass(frozen=True)
class PeftConfig:
    """The settings in a configuration of MiSS or Bone.

    Attributes:
        legacy: whether it is a configuration of Bone, whose blocks have another name.
        method: `"bone"` or `"bat"`.
        r: shard size.
        r_out: size of the output shard of a tile ("mini"), or None.
        dropout: probability with which the adapter's input is zeroed in training.
        target_modules: names of layers, a regex, or None if the model decides.
        bias: `"none"`, `"all"`, or `"only"` for biases of the adapted layers.
        modules_to_save: endings of the names of modules that are trained and saved completely.
        notes: the `NOTES` that have a value.
    """

    legacy: bool
    method: str
    r: int
    r_out: int | None = None
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def block_name(self) -> str:
        """The last part of a block's key."""
        return "bone_block" if self.legacy else "miss_block"


def fields_of(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a configuration of MiSS, as PEFT writes them."""
    return {
        "auto_mapping": None,
        "bias": "MiSS_only" if config.bias == "only" else config.bias,
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": INIT_WEIGHTS[config.method] if config.r_out is None else "mini",
        "layers_pattern": None,
        "layers_to_transform": None,
        "mini_r": config.r_out or 1,
        "miss_dropout": config.dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": MISS,
        "r": config.r,
        "target_modules": config.target_modules,
        **{note: config.notes.get(note) for note in NOTES},
    }


def config_of(fields: Fields) -> PeftConfig:
    """Return the configuration in the fields of a file.

    Raises:
        AdapterFileError: they are not a configuration of MiSS or Bone, or use a setting that is
            not supported.
    """
    peft_type = fields.get("peft_type")
    if peft_type not in (MISS, BONE):
        raise fields.wrong("peft_type", f"{MISS!r} or {BONE!r} (disha.interop.lora reads 'LORA')")
    legacy = peft_type == BONE
    method, r_out = _method(fields, legacy)
    config = PeftConfig(
        legacy=legacy,
        method=method,
        r=fields.size("r", 64),
        r_out=r_out,
        dropout=0.0 if legacy else _dropout(fields, method),
        target_modules=_target_modules(fields),
        bias=_bias(fields, legacy),
        modules_to_save=fields.modules_to_save(),
        notes=_notes(fields),
    )
    fields.refuse_unread(_IGNORED)
    return config


def _method(fields: Fields, legacy: bool) -> tuple[str, int | None]:
    """Return the method and the output shard that `init_weights` stands for."""
    init = fields.get("init_weights", True)
    fields.get("mini_r")  # PEFT always writes it, but uses it for "mini" only
    if init == "mini" and not legacy:
        return "bone", fields.size("mini_r", 1)
    # False means the same as True, but with random values at the start of training.
    known = {value: method for method, value in INIT_WEIGHTS.items()} | {False: "bone"}
    if not isinstance(init, (bool, str)) or init not in known:
        allowed = "true, false or 'bat'" + ("" if legacy else ", or 'mini'")
        raise fields.wrong("init_weights", allowed)
    return known[init], None


def _dropout(fields: Fields, method: str) -> float:
    dropout = fields.get("miss_dropout", 0.0)
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not number or not 0.0 <= dropout < 1.0:
        raise fields.wrong("miss_dropout", "a number of at least 0 and below 1")
    return 0.0 if method == BAT else float(dropout)  # PEFT's BAT ignores the field


def _target_modules(fields: Fields) -> str | tuple[str, ...] | None:
    value = fields.get("target_modules")
    return value if value is None or isinstance(value, str) else fields.names("target_modules")


def _bias(fields: Fields, legacy: bool) -> str:
    bias = fields.get("bias", "none")
    only = ("bone_only", "Bone_only") if legacy else ("MiSS_only", "miss_only")
    if bias in only:
        return "only"
    if bias not in ("none", "all"):
        raise fields.wrong("bias", f"'none', 'all' or {only[0]!r}")
    return str(bias)


def _notes(fields: Fields) -> dict[str, str]:
    found = {}
    for note in NOTES:
        value = fields.get(note)
        if value is not None and not isinstance(value, str):
            raise fields.wrong(note, "text or null")
        if value:
            found[note] = value
    return found
