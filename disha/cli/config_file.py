"""Flags from a file: YAML or TOML that holds them by their names."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from disha.errors import ArgumentError

__all__ = ["arguments_in"]


def arguments_in(path: Path, known: Collection[str]) -> list[str]:
    """Return what a file of flags says, as the words of a command line.

    Args:
        path: a file ending with .yaml, .yml or .toml.
        known: the names that flags may have, with underscores.

    Raises:
        ArgumentError: the file is missing, damaged, or of another kind, or holds a name that is no
            flag's, a name twice, or a value that no flag can have.
    """
    words: list[str] = []
    names: set[str] = set()
    for key, value in _contents(path).items():
        name = str(key).replace("-", "_")
        _require_known(name, known, path)
        if name in names:
            raise ArgumentError(f"--config {path} holds {name} twice, with a dash and without")
        names.add(name)
        if value is not None:
            words += [f"--{name}", *_words(name, value, path)]
    return words


def _contents(path: Path) -> Mapping[Any, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ArgumentError(f"--config {path} must end with .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArgumentError(f"--config {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--config {path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ArgumentError(f"--config {path} can't be read: {error.strerror}") from error
    found = _toml(text, path) if suffix == ".toml" else _yaml(text, path)
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"--config {path} must hold flags by their names, as in `bone_r: 64`, found "
            f"{type(found).__name__}"
        )
    return found


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.load(text, _yaml_loader(yaml)) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArgumentError(f"--config {path} is not YAML: {_one_line(error)}") from error


def _yaml_loader(yaml: Any) -> Any:
    """Return YAML's safe loader, which takes 2e-5 for a number as everybody means it.

    Nor does it take the last of several values, which is most likely a mistake.
    """

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"it holds {twice} twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        "-+0123456789",
    )
    return Loader


def _toml(text: str, path: Path) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ArgumentError(f"--config {path} is not TOML: {_one_line(error)}") from error


def _require_known(name: str, known: Collection[str], path: Path) -> None:
    if name == "config":
        raise ArgumentError(
            f"--config {path} names another file of flags in turn; put all flags into one"
        )
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ArgumentError(f"--config {path} holds {name!r}, which is no flag's name{hint}")


def _words(name: str, value: object, path: Path) -> Iterator[str]:
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, (str, int, float, bool)):
            raise ArgumentError(
                f"--config {path}: {name} must be a text, a number, true or false, or a list of "
                f"such, found {type(one).__name__}"
            )
        yield str(one)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
