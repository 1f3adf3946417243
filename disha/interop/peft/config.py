"""`adapter_config.json` of PEFT's MiSS and of Bone, its earlier name: read, checked and written.

Every field is read for what PEFT (0.21; 0.18 for Bone) does with it. One that this library does not
know is refused unless it is empty: whatever it means, loading would be another adapter without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disha.errors import AdapterFileError
from disha.files.json_files import read_json
from disha.interop.patterns import PatternError
from disha.interop.targets import Targets, is_plain

__all__ = ["BONE", "MISS", "NOTES", "PeftConfig", "fields_of", "read_config", "refused_pattern"]

MISS, BONE = "MISS", "BONE"

NOTES = ("base_model_name_or_path", "revision", "task_type")
"""Fields that say where an adapter belongs and change nothing of what it computes."""

_IGNORED = ("auto_mapping", "inference_mode", "peft_version", "runtime_config")
"""Fields without effect on a loaded adapter: PEFT itself sets or drops them when it loads."""

_EMPTY: tuple[object, ...] = (None, False, "", [], {})
"""Values with which a field asks for nothing."""

MOST = {"modules_to_save": 10_000, "layers_pattern": 100}
"""Entries that these lists may have: each is looked for in many names."""


@dataclass(frozen=True)
class PeftConfig:
    """What a configuration comes to.

    Attributes:
        legacy: whether it is one of Bone, whose blocks are called otherwise.
        method: `"bone"` or `"bat"`.
        r: shard size.
        r_out: size of the output shard of a tile ("mini"), or None.
        dropout: probability with which the adapter's input is zeroed in training.
        target_modules: names, a regex, or None where the model decides.
        exclude_modules: names, a regex or None.
        layers_to_transform: numbers of the layers that a list of targets means; all where empty.
        layers_pattern: what stands in front of that number.
        bias: `"none"`, `"all"`, or `"only"` for those of the adapted layers.
        modules_to_save: ends of the names of modules that are trained and saved whole.
        notes: those of `NOTES` that it has.
    """

    legacy: bool
    method: str
    r: int
    r_out: int | None = None
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def targets(self, path: Path) -> Targets:
        """Return which layers are selected.

        Raises:
            AdapterFileError: by a regex that can't be matched in bounded time.
        """
        try:
            return Targets(
                self.target_modules,
                self.exclude_modules,
                self.modules_to_save,
                self.layers_to_transform,
                self.layers_pattern,
            )
        except PatternError as error:
            raise refused_pattern(path, error) from error


def refused_pattern(path: Path, error: PatternError) -> AdapterFileError:
    """Return the error for a regex that is not matched."""
    return AdapterFileError(
        f"{path}: {error}. Give the names of the layers as a list in its place, as PEFT also takes"
    )


# --- writing -------------------------------------------------------------------------------------


def fields_of(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a configuration of MiSS, as PEFT writes them."""
    kind = "bat" if config.method == "bat" else True if config.r_out is None else "mini"
    return {
        "auto_mapping": None,
        "bias": "MiSS_only" if config.bias == "only" else config.bias,
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": kind,
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


# --- reading -------------------------------------------------------------------------------------


def read_config(path: Path) -> PeftConfig:
    """Return the configuration in a file.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is no configuration of MiSS or Bone, or has something that is not
            supported.
    """
    fields = _Fields(path, read_json(path))
    peft_type = fields.get("peft_type")
    if peft_type not in (MISS, BONE):
        raise fields.wrong(
            "peft_type",
            f"{MISS!r} or {BONE!r}; PEFT's other methods, LoRA among them, are other adapters",
        )
    legacy = peft_type == BONE
    method, r_out = _kind(fields, legacy)
    config = PeftConfig(
        legacy=legacy,
        method=method,
        r=fields.size("r", 64),
        r_out=r_out,
        dropout=0.0 if legacy else _dropout(fields, method),
        target_modules=fields.names_or_regex("target_modules"),
        exclude_modules=fields.names_or_regex("exclude_modules"),
        layers_to_transform=fields.numbers("layers_to_transform"),
        layers_pattern=_plain(fields, "layers_pattern", fields.one_or_more_names("layers_pattern")),
        bias=_bias(fields, legacy),
        modules_to_save=_plain(fields, "modules_to_save", fields.names("modules_to_save")),
        notes=_notes(fields),
    )
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name):
                raise fields.wrong(name, "absent where target_modules is a regex, as PEFT has it")
    fields.refuse_others()
    return config


def _kind(fields: _Fields, legacy: bool) -> tuple[str, int | None]:
    """Return the method and the output shard that `init_weights` stands for."""
    init = fields.get("init_weights", True)
    fields.read.add("mini_r")  # there, and without effect, whatever the kind
    if init == "bat":
        return "bat", None
    if isinstance(init, bool):  # False: as True, but the block started with random values
        return "bone", None
    if init == "mini" and not legacy:
        return "bone", fields.size("mini_r", 1)
    raise fields.wrong("init_weights", "true, false or 'bat'" + ("" if legacy else ", or 'mini'"))


def _dropout(fields: _Fields, method: str) -> float:
    dropout = fields.get("miss_dropout", 0.0)
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not number or not 0.0 <= dropout < 1.0:
        raise fields.wrong("miss_dropout", "a number of at least 0 and below 1")
    return 0.0 if method == "bat" else float(dropout)  # PEFT has the field, but its BAT no dropout


def _bias(fields: _Fields, legacy: bool) -> str:
    bias = fields.get("bias", "none")
    only = ("bone_only", "Bone_only") if legacy else ("MiSS_only", "miss_only")
    if bias in only:
        return "only"
    if bias not in ("none", "all"):
        raise fields.wrong("bias", f"'none', 'all' or {only[0]!r}")
    return str(bias)


def _plain(fields: _Fields, field: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > MOST[field]:
        raise fields.wrong(field, f"of at most {MOST[field]:,} names")
    if not all(is_plain(name) for name in names):
        raise fields.wrong(
            field, "plain names of letters, digits, dots, hyphens and underscores, not a regex"
        )
    return names


def _notes(fields: _Fields) -> dict[str, str]:
    found = {}
    for note in NOTES:
        value = fields.get(note)
        if value is not None and not isinstance(value, str):
            raise fields.wrong(note, "text or null")
        if value:
            found[note] = value
    return found


class _Fields:
    """The fields of a configuration, each checked as it is read."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self.read: set[str] = set()

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field as it is, or what PEFT takes where it is absent."""
        self.read.add(field)
        return self.values.get(field, default)

    def wrong(self, field: str, allowed: str) -> AdapterFileError:
        """Return the error for a field."""
        shown = repr(self.values.get(field))
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return AdapterFileError(f"{self.path}: {field} must be {allowed}; it is {shown}")

    def size(self, field: str, default: int) -> int:
        """Return a field that must be a size."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.wrong(field, "an integer of at least 1")
        return value

    def numbers(self, field: str) -> tuple[int, ...]:
        """Return a field that must be an integer, a list of them, or null."""
        value = self.get(field)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
            raise self.wrong(field, "an integer, a list of them or null")
        return tuple(values)

    def names(self, field: str) -> tuple[str, ...]:
        """Return a field that must be a list of names, or null."""
        value = self.get(field)
        return () if value is None else self._checked(field, value, "a list of names or null")

    def one_or_more_names(self, field: str) -> tuple[str, ...]:
        """Return a field that must be a name, a list of them, or null."""
        value = self.get(field)
        values = [value] if isinstance(value, str) and value else value or []
        return self._checked(field, values, "a name, a list of them or null")

    def names_or_regex(self, field: str) -> str | tuple[str, ...] | None:
        """Return a field that must be a list of names, a regex, or null."""
        value = self.get(field)
        if value is None or isinstance(value, str):
            return value
        return self._checked(field, value, "a list of names, a regex or null")

    def _checked(self, field: str, value: object, allowed: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self.wrong(field, allowed)
        return tuple(value)

    def refuse_others(self) -> None:
        """Raise if there is a field that has not been read and says something."""
        others = sorted(set(self.values) - self.read - set(_IGNORED))
        meant = [field for field in others if self.values[field] not in _EMPTY]
        if meant:
            shown = ", ".join(f"{field}={str(self.values[field])[:40]}" for field in meant[:10])
            raise AdapterFileError(
                f"{self.path} has fields that are not known here and may change what the adapter "
                f"computes: {shown}. Upgrade disha-torch; or, where they have no effect on MiSS "
                "or Bone, set them to null"
            )
