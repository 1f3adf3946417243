"""The reference of the command line has every flag of every command."""

from disha.cli import COMMANDS
from disha.finetune import arguments
from docs.commands import MIGRATING, PAGE, migrating, page, parser_of

TEXT = PAGE.read_text(encoding="utf-8")


def flags_of(parser):
    actions = [action for action in parser._actions if action.dest not in ("help", "help_all")]
    return {name for action in actions for name in action.option_strings if "-" not in name[2:]}


def test_it_is_that_of_the_parsers():
    assert page() == TEXT, "run `python -m docs.commands`"


def test_the_tables_of_names_are_those_of_the_parser():
    text = MIGRATING.read_text(encoding="utf-8")
    assert migrating(text) == text, "run `python -m docs.commands`"
    assert "| `lora_r` | trl | `--method lora --r VALUE` |" in text
    assert "| `micro_batch_size` | axolotl | `--per_device_train_batch_size VALUE` |" in text


def test_it_has_every_flag_of_every_command():
    for command in COMMANDS:
        section = (
            TEXT.split(f"\n## disha {command}\n")[1].split("\n## ")[0] + TEXT.split("\n## ")[0]
        )
        own = flags_of(parser_of(command)) if command != "finetune" else set()
        assert [flag for flag in own if f"`{flag}`" not in section] == []


def test_it_has_what_finetune_adds_to_the_flags_of_trl():
    section = TEXT.split("\n## disha finetune\n")[1].split("\n## ")[0]
    for group in (arguments.AdapterArguments, arguments.DataArguments):
        for name in group.__dataclass_fields__:
            assert f"`--{name}`" in section
