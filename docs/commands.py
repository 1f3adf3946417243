"""`python -m docs.commands`: write the flags into pages.

docs/reference/commands.md comes from the parsers of the commands; the tables of docs/migrating.md
come from the names that flags have elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from trl import SFTConfig

from benchmarks.markdown import fill
from disha.cli import dispatcher
from disha.finetune import arguments
from disha.finetune.names import DEFAULTS, FAMILIES, SYMBOLS

PAGE = Path(__file__).parent / "reference" / "commands.md"
MIGRATING = Path(__file__).parent / "migrating.md"
TABLES = {
    "commands": {"trl": "trl", "peft": "PEFT", "author": "author"},
    "files": {"axolotl": "axolotl", "llama-factory": "LLaMA-Factory"},
}
"""A table of the page on migrating -> the families of names in it, and what they are called."""
HEAD = """\
# Command line

The flags of every command. `python -m docs.commands` writes this page from the parsers; do not edit
it. [Fine-tuning from the command line](../finetuning.md) shows the commands at work.

A flag may have dashes or underscores: `--max-new-tokens` is `--max_new_tokens`. Every command has
`--help`, and `--debug`, which shows where an error came from. An error is one line on standard
error, and the exit code says of which sort it is:

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | the work failed, or the answer of `inspect --base` or `check-server` is no |
| 2 | the input can't be used: a flag, a file, a missing package |
| 130 | interrupted by Ctrl-C |
"""
FINETUNE = """\
## disha finetune

Train an adapter for a language model with `SFTTrainer` of `trl`. All flags of
[`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) work, and `disha finetune
--help_all` lists them. The table has those that `disha` adds, or to which it gives another default.
"""


class _Seen(Exception):
    """Carries the parser of a command."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that a command makes."""

    def seen(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Seen(parser)

    module = import_module(f"disha.cli.{command.replace('-', '_')}")
    with patch.object(argparse.ArgumentParser, "parse_known_args", seen):
        try:
            module.main([])
        except _Seen as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"{command} reads no flags")


def page() -> str:
    """Return the page."""
    others = [name for name in dispatcher.COMMANDS if name != "finetune"]
    return "\n".join([HEAD, finetune(), *(_command(name) for name in others)])


def finetune() -> str:
    """Return the section of `disha finetune`."""
    parser = arguments._parser(shows_all=True)
    of_trl = {field.name: field.metadata.get("help") for field in dataclasses.fields(SFTConfig)}
    own = [action for action in _shown(parser) if of_trl.get(action.dest) != action.help]
    others = "\n".join(_rows_of_names({"disha": ""}))
    return (
        f"{FINETUNE}\n{_table(own)}\nOther names of these flags; those of other projects are "
        f"[here](../migrating.md#commands-and-files-of-others):\n\n"
        f"| name | meaning |\n| --- | --- |\n{others}\n"
    )


def migrating(text: str) -> str:
    """Return the page on migrating with the tables of names."""
    tables = {}
    for name, families in TABLES.items():
        rows = "\n".join(_rows_of_names(families))
        tables[name] = f"| there | of | here |\n| --- | --- | --- |\n{rows}\n"
    symbols = "\n".join(f"| `{word}` | {meaning} |" for word, meaning in SYMBOLS.items())
    tables["symbols"] = f"| word | stands for |\n| --- | --- |\n{symbols}\n"
    return fill(text, tables)


def _rows_of_names(families: Mapping[str, str]) -> Iterator[str]:
    """Give a row for each name of some families, with those that have it."""
    owners: dict[tuple[str, str], list[str]] = {}
    for family, called in families.items():
        for name, meaning in FAMILIES[family].items():
            owners.setdefault((name, meaning), []).append(called)
    for (name, meaning), called in owners.items():
        here = f"`{meaning}`" if meaning.startswith("--") else meaning
        if not meaning.startswith(("--", "nothing")):
            here = f"refused: {meaning}"
        if name in DEFAULTS:
            here += f"; what is left out is `{DEFAULTS[name]}`"
        cells = [f"`{name}`", *filter(None, [", ".join(called)]), here]
        yield f"| {' | '.join(cells)} |"


def _command(name: str) -> str:
    parser = parser_of(name)
    about = (parser.description or "").strip()
    text, _, examples = about.partition("Examples:\n")
    joined = re.sub(r"\n {8,}", " ", text.strip())
    listed = re.sub(r"^  (\w+) +(?=\S)", r"- `\1`: ", joined, flags=re.MULTILINE)
    listed = re.sub(r":\n- ", ":\n\n- ", listed)
    commands = "\n".join(line.strip() for line in examples.strip().splitlines())
    block = f"\n```sh\n{commands}\n```\n" if commands else ""
    return f"## disha {name}\n\n{listed}\n{block}\n{_table(_shown(parser))}"


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    hidden = ("help", "help_all", "debug")
    return [
        action
        for action in parser._actions
        if action.dest not in hidden and action.help != argparse.SUPPRESS
    ]


def _table(actions: Sequence[argparse.Action]) -> str:
    rows = "\n".join(f"| {' | '.join(_cells(action))} |" for action in actions)
    return f"| flag | default | meaning |\n| --- | --- | --- |\n{rows}\n"


def _cells(action: argparse.Action) -> Iterator[str]:
    """Return the names of a flag, its default, and what it does."""
    names = [name for name in action.option_strings if "-" not in name[2:]]
    yield ", ".join(f"`{name}`" for name in names) or f"`{action.dest.upper()}`"
    yield "required" if action.required else _default(action.default)
    words = " ".join((action.help or "").split())
    values: Mapping[str, object] | Sequence[object] = action.choices or ()  # type: ignore[assignment]
    choices = ", ".join(f"`{value}`" for value in values)
    text = f"{words} ({choices})" if choices and len(choices) < 100 else words
    yield re.sub(r"(?<!\\)\|", r"\\|", text).replace("<", "&lt;").replace("%%", "%")


def _default(value: object) -> str:
    if value is None or value == [] or value == argparse.SUPPRESS or callable(value):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{text}`"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    MIGRATING.write_text(migrating(MIGRATING.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE, MIGRATING)


if __name__ == "__main__":
    main()
