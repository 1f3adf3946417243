"""Arguments from dataclasses, and their help from the docstrings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from disha.cli.flags import Flags, parsed


@dataclass(frozen=True)
class Group:
    """The group.

    Args:
        rate: How fast,
            and why.
        top: At most so many.
    """

    rate: float = 0.5
    top: int | None = None


@dataclass(frozen=True)
class Settings:
    """All settings.

    Args:
        names: Some names.
        quiet: Print nothing.
    """

    group: Group = field(default_factory=Group)
    names: tuple[str, ...] = ()
    quiet: bool = False


@dataclass(frozen=True)
class Plain(Flags):
    """Some arguments.

    Args:
        what: What to do.
    """

    what: str


@pytest.fixture
def told(capsys):
    def help_of(*arguments):
        with pytest.raises(SystemExit, match="0"):
            parsed(*arguments)
        return " ".join(re.sub("[\u2500-\u257f]|-{3,}", " ", capsys.readouterr().out).split())

    return help_of


def test_a_text_of_several_lines_is_one_paragraph_with_its_default(told):
    assert "How fast, and why. (default: 0.5)" in told(Settings, "x", ["-h"], "", Settings())


def test_defaults_are_those_of_the_object_given(told):
    text = told(Settings, "x", ["-h"], "", Settings(Group(rate=0.25, top=7)))
    assert "(default: 0.25)" in text
    assert "At most so many. (default: 7)" in text


def test_texts_of_a_parent_and_required_flags_are_told(told):
    text = told(Plain, "x", ["-h"], "")
    assert "Print one JSON object, for scripts." in text
    assert "What to do. (required)" in text


def test_what_is_parsed_is_what_was_given():
    assert parsed(Settings, "x", ["--rate", "2", "--names", "a", "b"], "", Settings()) == Settings(
        Group(rate=2.0), ("a", "b")
    )
    assert parsed(Plain, "x", ["--what", "it", "--json"], "") == Plain("it", json=True)
