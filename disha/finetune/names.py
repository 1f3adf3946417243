"""What flags are called elsewhere, and what they are here: `names.toml`, read and applied.

It comes before a trainer is imported, which takes seconds. So the names of flags are read from the
sources of the dataclasses that have them.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

from disha.errors import ArgumentError
from disha.finetune.flags import Given, read_words, tell_unknown

FAMILIES: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
DEFAULTS = FAMILIES.pop("defaults")
"""A name that asks for a LoRA -> what the flags are there that are left out."""

SYMBOLS = FAMILIES.pop("symbols")
"""A word in a meaning -> what it stands for."""

TABLE = {name: meaning for family in FAMILIES.values() for name, meaning in family.items()}
"""A name elsewhere, or a name with one of its values -> what it is here."""

SOURCES = {
    "disha": ("finetune/arguments.py",),
    "trl": ("trainer/sft_config.py", "trainer/base_config.py"),
    "transformers": ("training_args.py",),
}
"""A package -> the files with the fields that are flags, of which a version may lack one."""

MANY = ("also_train", "data", "target")
"""The flags to which several names may add."""

GIVES_WAY = {"miss": ("bone", "bat")} | dict.fromkeys(("auto", "bf16", "fp16", "fp32"), ("4", "8"))
"""A general value -> the values that say it more exactly."""


class Flag(NamedTuple):
    """A flag with our name, and the flag elsewhere that it comes from."""

    name: str
    values: tuple[str, ...]
    source: str = ""
    is_default: bool = False

    def __str__(self) -> str:
        return " ".join((f"--{self.name}", *self.values))

    def describe(self) -> str:
        """Return the flag as it was given, and what it is here."""
        return f"{self.source} ({self})" if self.source else str(self)


def translate(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line with our names, and lines that say what was translated.

    A flag of the command line has precedence over one in the file of `--config`.
    """
    given = read_words(words)
    if any(name in ("help", "help_all") for name, _ in given):
        return [*words], []
    paths = dict(given).get("config")
    if paths == []:
        raise ArgumentError("name the file of --config")
    in_file = _read_file(Path(paths[0])) if paths else []
    given = [(name, values) for name, values in given if name != "config"]
    _require_known(name for name, _ in [*in_file, *given])
    needless: dict[str, str] = {}
    ours = [*_ours(given, needless)]
    names = {flag.name for flag in ours if flag.values != ("miss",)}
    ours += [flag for flag in _ours(in_file, needless) if flag.name not in names]
    flags = _compute(_agree(ours), dict([*in_file, *given]))
    told = [f"{flag} needs nothing here: {reason}" for flag, reason in needless.items()]
    sources = dict.fromkeys(flag.source for flag in ours if flag.source)
    if sources:
        read = " ".join(str(flag) for flag in flags if flag.source)
        told.insert(0, f"{' '.join(sources)}: read as {read}")
    return [word for flag in flags for word in _words_of(flag)], told


def flags_of_sources() -> set[str]:
    """Return the names of all fields in `SOURCES`."""
    names: set[str] = set()
    for package, files in SOURCES.items():
        [folder] = find_spec(package).submodule_search_locations  # type: ignore[union-attr, misc]
        for path in (path for file in files for path in Path(folder).glob(file)):
            source = path.read_text(encoding="utf-8")
            names.update(re.findall(r"^    (\w+): ", source, re.MULTILINE))
    return names


def _require_known(names: Iterable[str]) -> None:
    """Raise if flags are known neither here nor elsewhere, and name all of them."""
    known = flags_of_sources() | {name.partition("=")[0] for name in TABLE}
    unknown = [f"--{name}" for name in names if name not in known]
    if unknown:
        raise tell_unknown("disha finetune", unknown, [f"--{name}" for name in known])


def _read_file(path: Path) -> Given:
    """Return the flags in a YAML file. An empty value asks for nothing."""
    flags = yaml.safe_load(path.read_bytes())
    if not isinstance(flags, dict):
        raise ArgumentError(f"{path} holds no flags; write them in YAML, as in `r: 64`")
    given = []
    for name, value in flags.items():
        if value not in (None, []):
            items = value if isinstance(value, list) else [value]
            values = [json.dumps(item) if isinstance(item, dict) else str(item) for item in items]
            given.append((str(name).replace("-", "_"), values))
    return given


def _words_of(flag: Flag) -> list[str]:
    """Return the words of a flag; a single value may begin with a dash."""
    if len(flag.values) == 1:
        return [f"--{flag.name}={flag.values[0]}"]
    return [f"--{flag.name}", *flag.values]


# --- meanings ------------------------------------------------------------------------------------


def _ours(given: Given, needless: dict[str, str]) -> Iterator[Flag]:
    """Give the flags with our names, and note those that need nothing here, with the reason."""
    for name, values in given:
        said = str(Flag(name, tuple(values)))
        value = " ".join(values) or "True"
        is_off = value.lower() == "false"
        key = f"{name}={value.capitalize() if is_off or value == 'true' else value}"
        if key not in TABLE:
            key = name
        meaning = TABLE.get(key, f"--{name} VALUE")
        if is_off and key == name and not any(symbol in meaning for symbol in SYMBOLS):
            continue
        if meaning.startswith("nothing"):
            needless[said] = meaning.partition(": ")[2]
            continue
        if not meaning.startswith("--"):
            raise ArgumentError(f"{said}: {meaning}")
        source = "" if key not in TABLE or key in FAMILIES["disha"] else said
        for own, template in read_words(meaning.split()):
            filled = tuple(word for part in template for word in _fill(part, values))
            if filled or not (values and template):
                yield Flag(own, filled, source)
        for own, template in read_words(DEFAULTS.get(key, "").split()):
            yield Flag(own, tuple(template), said, is_default=True)


def _fill(part: str, values: Sequence[str]) -> list[str]:
    """Return what a part of a meaning is for the values of a flag."""
    if part in ("NAMES", "MODULES"):
        plain = all(re.fullmatch(r"[\w.,\s-]+", value) for value in values)
        names = re.split(r"[,\s]+", ",".join(values)) if plain else values
        return [_as_regex(name, "$" if part == "NAMES" else r"\.", plain) for name in names]
    if part == "PATHS":
        sets = [json.loads(value) if value.startswith("{") else {"path": value} for value in values]
        if any(one.keys() - {"path", "type"} for one in sets):
            raise ArgumentError(
                "of datasets, path and type are read; write --dataset_split and others for the rest"
            )
        return [one["path"] for one in sets]
    if part in ("EOS", "PAD"):
        token = json.loads(values[0]).get(f"{part.lower()}_token")
        return [] if token is None else [token]
    if part == "VALUE":
        return [*values]
    return [part.replace("VALUE", " ".join(values))]


def _as_regex(name: str, end: str, is_plain: bool) -> str:
    """Return a regex for a name that PEFT would match as a whole, or as the end of a name."""
    if name in ("all", "all-linear"):
        return "all-linear"
    return rf"(^|\.){re.escape(name)}{end}" if is_plain else f"^(?:{name}){end}"


def _agree(flags: Iterable[Flag]) -> Iterator[Flag]:
    """Give flags without general values beside exact ones; raise if translated ones differ."""
    by_name: dict[str, list[Flag]] = {}
    for flag in flags:
        by_name.setdefault(flag.name, []).append(flag)
    for name, group in by_name.items():
        stated = [flag for flag in group if not flag.is_default] or group[:1]
        exact = [flag for flag in stated if not _gives_way(flag, stated)]
        if name in MANY or not any(flag.source for flag in stated):
            yield from stated
            continue
        first = exact[0]
        other = next((flag for flag in exact if flag.values != first.values), None)
        if other is not None:
            raise ArgumentError(f"{first.describe()} contradicts {other.describe()}; leave one out")
        if first.values != ("miss",):  # Bone is the default, and an adapter may be BAT
            yield first


def _gives_way(flag: Flag, others: Sequence[Flag]) -> bool:
    exact = GIVES_WAY.get(" ".join(flag.values), ())
    return bool(flag.source) and any(" ".join(other.values) in exact for other in others)


def _compute(flags: Iterable[Flag], given: Mapping[str, Sequence[str]]) -> list[Flag]:
    """Return flags with the values that depend on other flags; one without a value is left out."""
    flags = list(flags)
    here = {flag.name: flag.values for flag in flags}

    def number(name: str, default: int, among: Mapping[str, Sequence[str]] = given) -> float:
        [text] = among.get(name) or [str(default)]
        try:
            return float(text) or 1  # nothing is divided by 0
        except ValueError as error:
            raise ArgumentError(f"--{name} must be a number, got {text}") from error

    r = number("r", 64, here)
    epochs = number("num_train_epochs", 1, here)
    roots = [given.get(name, ["False"]) for name in ("use_rslora", "peft_use_rslora")]
    has_root = any(value in ([], ["True"], ["true"]) for value in roots)
    is_mini = ["mini"] in (given.get("init_miss_weights"), given.get("init_miss_weight"))
    computed: dict[tuple[str, ...], float] = {
        ("ALPHA",): number("lora_alpha", 32) / (math.sqrt(r) if has_root else r),
        ("EVALS",): 1 / (number("evals_per_epoch", 1) * epochs),
        ("SAVES",): 1 / (number("saves_per_epoch", 1) * epochs),
        ("MINI",): number("miss_mini_r", 8),
    }
    found = []
    for flag in flags:
        value = computed.get(flag.values) if flag.source else None
        if flag.values != ("MINI",) or is_mini:
            found.append(flag if value is None else flag._replace(values=(f"{value:.16g}",)))
    return found
