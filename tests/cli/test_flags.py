"""Arguments from dataclasses, and their help from the docstrings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from disha.cli import COMMANDS
from disha.cli.flags import Flags, parsed
from disha.cli.meanings import COMMAND_WORDS, FLAG_WORDS, SHORT, in_flags, long_name, nearest
from disha.errors import ArgumentError
from disha.finetune.settings import FinetuneSettings


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
class Named:
    """One name.

    Args:
        name: A name.
    """

    name: str = ""


@dataclass(frozen=True)
class Plain(Flags):
    """Some arguments.

    Args:
        path: Where.
        what: What to do.
        names: Some names.
    """

    path: Path
    what: Literal["it", "that"] = field(kw_only=True)
    names: tuple[str, ...] = ()


@pytest.fixture
def told(capsys):
    def help_of(*arguments):
        with pytest.raises(SystemExit, match="0"):
            parsed(*arguments)
        return " ".join(capsys.readouterr().out.split())

    return help_of


def test_a_text_of_several_lines_is_one_paragraph_with_its_default(told):
    assert "How fast, and why. (default: 0.5)" in told(Settings, "x", ["-h"], "", Settings())


def test_an_empty_default_is_not_shown(told):
    assert "(default" not in told(Named, "x", ["-h"], "")


def test_defaults_are_those_of_the_object_given(told):
    text = told(Settings, "x", ["-h"], "", Settings(Group(rate=0.25, top=7)))
    assert "(default: 0.25)" in text
    assert "At most so many. (default: 7)" in text


def test_texts_of_a_parent_and_required_flags_are_told(told):
    text = told(Plain, "x", ["-h"], "")
    assert "usage: disha x PATH [flags]" in text
    assert "arguments: PATH Where." in text
    assert "Print one JSON object, for scripts." in text
    assert "What to do. (required)" in text


def test_what_is_parsed_is_what_was_given():
    words = ["--rate", "2", "--names", "a", "b", "--quiet"]
    for extra, quiet in (([], True), (["False"], False), (["yes"], True)):
        assert parsed(Settings, "x", [*words, *extra], "", Settings()) == Settings(
            Group(rate=2.0), ("a", "b"), quiet
        )
    given = parsed(Plain, "x", ["--names", "a", "--json", "p", "--names=b", "--what", "it"], "")
    assert given == Plain(Path("p"), json=True, what="it", names=("a", "b"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--rate", "--rate needs a value"),
        ("--rate x", "--rate must be a number, got 'x'"),
        ("--rate=", "--rate must be a number, got ''"),
        ("--top 1.5", "--top must be a whole number, got '1.5'"),
        ("--quiet perhaps", "--quiet must be True or False, got 'perhaps'"),
        ("--quiet no more", "this is not understood: more"),
        ("-q", "this is not understood: -q"),
        ("--to 1", "x has no flag --to; did you mean --top?"),
        ("--RATES 1", "x has no flag --RATES; did you mean --rate?"),
        ("--ra 1", "x has no flag --ra; "),  # nothing is abbreviated
        ("--zzz", "x has no flag --zzz; disha x --help shows all flags"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, complaint):
    with pytest.raises(ArgumentError, match=re.escape(complaint)) as caught:
        parsed(Settings, "x", words.split(), "", Settings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--what it", "this is missing: PATH"),
        ("p", "this is missing: --what"),
        ("p --what other", "--what must be one of it, that, got 'other'"),
        ("p --what it q", "this is not understood: q"),
    ],
)
def test_what_is_missing_is_named(words, complaint):
    with pytest.raises(ArgumentError, match=re.escape(complaint)):
        parsed(Plain, "x", words.split(), "")


def test_an_empty_text_is_no_path(run, files):
    """A shell writes it for a variable that is not set."""
    adapter = files.adapter()
    done = run("merge", files.base(), adapter, "", "--overwrite")
    assert (done.code, done.complaint) == (
        2,
        "disha: PATHS must be a path, got ''; disha merge --help says more\n",
    )
    for words in (["--base", ""], ["--base="]):
        done = run("verify", adapter, *words)
        assert (done.code, done.complaint) == (
            2,
            "disha: --base must be a path, got ''; disha verify --help says more\n",
        )
    assert files.names() == {"a.safetensors", "base", "base/model.safetensors"}


def test_a_value_may_look_like_a_flag():
    words = ["--names", "--a text with spaces", "-1", "--rate=-1"]
    given = parsed(Settings, "x", words, "", Settings())
    assert given == Settings(Group(rate=-1.0), ("--a text with spaces", "-1"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("learningrate", "learning_rate"),
        ("learning-rte", "learning_rate"),
        ("rank", "r"),
        ("lora_r", "r"),
        ("lora-rank", "r"),
        ("batch", "batch_size"),
        ("train_batch_size", "batch_size"),
        ("model_name_or_path", "base"),
        ("model-name", "base"),
        ("dataset", "data"),
        ("train_file", "data"),
        ("epoch", "epochs"),
        ("num_epochs", "epochs"),
        ("out", "output"),
        ("output-directory", "output_dir"),
        ("steps", "max_steps"),
        ("max_length", "max_seq_length"),
        ("cutoff_len", "max_seq_length"),
        ("lora_dropout", "adapter_dropout"),
        ("target_modules", "target"),
        ("modules_to_save", "also_train"),
        ("load_in_4bit", "bits 4"),
        ("fp16", "bf16"),
        ("overwrite", "overwrite_output_dir"),
        ("resume_from_checkpoint", "resume"),
        ("warmup_steps", "warmup_ratio"),
        ("scheduler", "lr_scheduler_type"),
        ("prompt", None),
        ("zzz", None),
    ],
)
def test_a_flag_of_another_tool_is_told_by_its_meaning(word, meant):
    assert nearest(word, FinetuneSettings().to_json(), FLAG_WORDS) == meant


def test_all_meanings_are_flags_of_some_command_and_no_word_hides_a_flag():
    flags = {
        *FinetuneSettings().to_json(),
        *("json", "prompt", "prompt_file", "adapter", "temperature", "max_new_tokens"),
        *("rank", "overwrite", "dropout", "architecture", "per_device_eval_batch_size"),
    }
    assert {long_name(meaning.split()[0], flags) for meaning in FLAG_WORDS} <= flags
    assert set(" ".join(SHORT.values()).split()) <= flags
    assert set(COMMAND_WORDS) == set(COMMANDS)
    assert not set(" ".join(COMMAND_WORDS.values()).split()) & set(COMMANDS)
    for short, name in ((one, name) for one, long in SHORT.items() for name in long.split()):
        assert nearest(short, {name}, {}) == short
        assert long_name(short, {name}) == long_name(name, {name}) == name
        assert long_name(short, {name, short}) == short


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("r must be at least 1, got 0", "--r must be at least 1, got 0"),
        ("a: r=9 is larger than in=8", "a: --r 9 is larger than in=8"),
        ("exclude 'x' matches nothing", "--ex 'x' matches nothing"),
        ("exclude='x' matches nothing", "--ex 'x' matches nothing"),
        ("leave it out with exclude=", "leave it out with --ex"),
        ("leave it out (`exclude`, `other`)", "leave it out (--ex, `other`)"),
        ("pass force=True, or not", "pass --force, or not"),
        ("runs/r=8 exists; r is its name", "runs/r=8 exists; r is its name"),
        ("the r must be exclude", "the r must be exclude"),
    ],
)
def test_errors_of_the_library_are_told_in_flags(message, said):
    assert in_flags(message, {"r": "--r", "exclude": "--ex", "force": "--force"}) == said


def test_flags_in_place_of_arguments_are_flags_of_the_command(run):
    for name, command in COMMANDS.items():
        told = run(name, "--help").out
        for flag in command.flags.values():
            if flag.startswith("--"):
                assert f"{flag} " in told, (name, flag)
