"""Parse the arguments of a command.

The arguments are the fields of a dataclass, and its docstring is the help. A field that is itself a
dataclass is a group of flags. A field without a default is a positional argument, or a required
flag if it is keyword-only.

In a command without positional arguments, values may follow every flag: `--bf16 True`,
`--dataset_field query response`. In other commands, a positional argument may follow a flag. So
there a switch takes no value, and a list takes one value each time that its flag is given.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from disha.cli.dispatcher import debugging
from disha.cli.meanings import FLAG_WORDS, SHORT, long_name, nearest
from disha.errors import ArgumentError
from disha.text import brief

__all__ = ["Flags", "parsed"]

T = TypeVar("T")

SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
FLAG = re.compile(r"--(?P<name>[A-Za-z][\w-]*)(?P<value>=.*)?", re.DOTALL)
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "True|False", Path: "PATH"}


@dataclass(frozen=True)
class Flags:
    """The arguments that the commands for files share.

    Args:
        json: Print one JSON object, for scripts.
        debug: Show where an error came from.
    """

    json: bool = field(default=False, kw_only=True)
    debug: bool = field(default=False, kw_only=True)


def parsed(
    flags: type[T],
    name: str,
    arguments: Sequence[str],
    description: str,
    default: T | None = None,
    first: Sequence[str] = (),
) -> T:
    """Return the arguments of a command. Flags may be spelled with underscores or dashes.

    Args:
        flags: a dataclass with a field for each.
        name: the command's name.
        arguments: the words after it.
        description: the start of the help.
        default: the values of arguments that are not given; by default those of the dataclass.
        first: names of flags that the help shows before all groups.

    Raises:
        ArgumentError: the arguments are invalid.
        SystemExit: they ask for help, which is printed; or they are invalid, and another process
            reports it.
    """
    known = list(_arguments_of(flags, default))
    positional = [one.name.upper() for one in known if one.positional]
    parser = _Parser(
        prog=name,
        usage=" ".join(["disha", name, *positional, "[flags]"]),
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        add_help=False,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    place = {name: number for number, name in enumerate(first)}
    for one in sorted(known, key=lambda one: place.get(one.name, len(place))):
        title = "most used" if one.name in place else one.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], one, worded=not positional)
    groups[GENERAL].add_argument("-h", "--help", action="help", help="Show this help.")
    names = {"help", *(one.name for one in known if not one.positional)}
    words = _spelled(arguments, name, names, "-" if positional else "_")
    given = vars(parser.parse_intermixed_args(list(words)))
    debugging.set(given.get("debug", False))
    return _filled(flags, given, default)


GENERAL = "general"
"""The group of the fields that are not in a dataclass of their own."""


@dataclass(frozen=True)
class _Argument:
    """One argument of a command."""

    name: str
    type: Any
    default: Any
    positional: bool
    help: str
    group: str


def _arguments_of(kind: type, values: Any, group: str = GENERAL) -> Iterator[_Argument]:
    """Yield the arguments of a dataclass. An object of it in `values` gives the defaults."""
    types, texts = get_type_hints(kind), _texts_of(kind)
    for one in fields(kind):
        default = one.default if values is None else getattr(values, one.name)
        type_ = types[one.name]
        if is_dataclass(type_):
            yield from _arguments_of(type_, default, one.name)  # type: ignore[arg-type]
            continue
        if NoneType in get_args(type_):  # as in `int | None`
            type_ = next(part for part in get_args(type_) if part is not NoneType)
        positional = default is MISSING and not one.kw_only
        title = "arguments" if positional else group
        yield _Argument(one.name, type_, default, positional, texts.get(one.name, ""), title)


def _texts_of(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and of its parents say of each field."""
    texts: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        doc = inspect.cleandoc(one.__doc__ or "")
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", doc, re.MULTILINE):
            texts[name] = " ".join(text.split())
    return texts


def _add(group: argparse._ArgumentGroup, one: _Argument, *, worded: bool) -> None:
    """Add an argument to a parser. With `worded`, values may follow every flag."""
    listed = get_origin(one.type) is tuple
    type_ = get_args(one.type)[0] if listed else one.type
    allowed = get_args(type_) if get_origin(type_) is Literal else ()
    text = one.help.replace("%", "%%")
    options: dict[str, Any]
    if one.positional:
        options = {"nargs": "*"} if listed else {}
        read = partial(_read, Path, ())
        group.add_argument(one.name, metavar=one.name.upper(), type=read, help=text, **options)
        return
    if one.default is MISSING:
        text += " (required)"
    elif one.default is not None and one.default is not False and one.default not in ((), ""):
        shown = " ".join(map(str, one.default)) if listed else str(one.default)
        text += f" (default: {shown})".replace("%", "%%")
    names = [*(short for short, long in SHORT.items() if one.name in long.split()), one.name]
    options = {
        "dest": one.name,
        "default": argparse.SUPPRESS,
        "required": one.default is MISSING,
        "help": text,
    }
    if type_ is bool and not worded:
        options["action"] = "store_true"
    else:
        options["type"] = partial(_read, type_, allowed)
        options["metavar"] = "{" + ",".join(allowed) + "}" if allowed else METAVARS[type_]
    if type_ is bool and worded:
        options |= {"nargs": "?", "const": True}
    elif listed:
        options |= {"nargs": "*"} if worded else {"action": "append"}
    group.add_argument(
        *(f"--{name if worded else name.replace('_', '-')}" for name in names), **options
    )


def _read(type_: Any, allowed: Collection[str], word: str) -> Any:
    """Return the value that a word stands for."""
    if allowed:
        if word not in allowed:
            raise _wrong_value(f"one of {', '.join(allowed)}", word)
        return word
    if type_ is bool:
        if word.lower() not in SWITCHES:
            raise _wrong_value("True or False", word)
        return SWITCHES[word.lower()]
    if type_ is Path and not word:  # for Python, it is the current folder
        raise _wrong_value("a path", word)
    try:
        return type_(word)
    except ValueError:
        kind = "a whole number" if type_ is int else "a number"
        raise _wrong_value(kind, word) from None


def _wrong_value(allowed: str, word: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {allowed}, got {brief(word)}")


def _spelled(
    words: Sequence[str], command: str, known: Collection[str], joint: str
) -> Iterator[str]:
    """Yield the words of a command line, with flags as the parser knows them.

    Args:
        words: the words.
        command: the name of the command.
        known: the names of its flags.
        joint: what joins the words of a flag's name: a dash or an underscore.

    Raises:
        ArgumentError: a flag is not known.
    """
    for number, word in enumerate(words):
        found = FLAG.fullmatch(word)
        if word == "--":
            yield from words[number:]
            return
        if found is None:
            yield word
            continue
        name = long_name(found["name"], known)
        if name not in known:
            near = nearest(found["name"], known, FLAG_WORDS)
            hint = "" if near is None else f"did you mean --{near.replace('_', joint)}? "
            raise _wrong_usage(
                f"{command} has no flag --{found['name']}; {hint}"
                f"disha {command} --help shows all flags"
            )
        yield f"--{name.replace('_', joint)}{found['value'] or ''}"


def _filled(kind: type[T], given: Mapping[str, Any], default: T | None) -> T:
    """Return an object of a dataclass and of its groups, with the given values."""
    values: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        group = getattr(default, one.name, None)
        if is_dataclass(group):
            values[one.name] = _filled(type(group), given, group)
        elif one.name in given:
            value = given[one.name]
            values[one.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values) if default is None else replace(default, **values)  # type: ignore[type-var]


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument (?:--[\w-]+/)*([\w-]+): ", r"\1 ", message)
        for theirs, plain in PLAIN.items():
            said = said.replace(theirs, plain)
        raise _wrong_usage(f"{said}; disha {self.prog} --help says more")


PLAIN = {
    "expected one argument": "needs a value",
    "the following arguments are required: ": "this is missing: ",
    "unrecognized arguments: ": "this is not understood: ",
}
"""What argparse says -> the same in plain words."""


def _wrong_usage(complaint: str) -> BaseException:
    """Return the error. Under torchrun every process finds it, and only the first reports it."""
    if os.environ.get("RANK", "0") == "0":
        return ArgumentError(complaint)
    from disha.finetune.stopping import wait_for_first  # imports torch

    wait_for_first()
    return SystemExit(2)
