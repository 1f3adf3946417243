"""Flags from YAML and TOML."""

from __future__ import annotations

import pytest

from disha.cli.config_file import arguments_in
from disha.errors import ArgumentError

KNOWN = {"bone_r", "learning_rate", "dataset_field", "bf16", "target", "bits"}


@pytest.fixture
def words(tmp_path):
    """Write a file of flags, and return the words it stands for."""

    def words_of(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return arguments_in(path, KNOWN)

    return words_of


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "RUN.YAML"])
def test_yaml(words, name):
    text = """
# a comment
bone_r: 64
learning-rate: 2e-5
dataset_field: [query, response]
bf16: true
target: null
bits: "4"
"""
    assert words(text, name) == [
        *("--bone_r", "64"),
        *("--learning_rate", "2e-05"),
        *("--dataset_field", "query", "response"),
        *("--bf16", "True"),
        *("--bits", "4"),
    ]


def test_toml(words):
    text = 'bone_r = 64\nlearning_rate = 2e-5\ndataset_field = ["query", "response"]\nbf16 = true\n'
    assert words(text, "run.toml") == [
        *("--bone_r", "64"),
        *("--learning_rate", "2e-05"),
        *("--dataset_field", "query", "response"),
        *("--bf16", "True"),
    ]


@pytest.mark.parametrize("text", ["2e-5", "2.e-5", "2E-5", "+2e-5", "0.00002"])
def test_numbers_of_yaml_are_what_everybody_means(words, text):
    name, value = words(f"learning_rate: {text}")
    assert name == "--learning_rate"
    assert float(value) == 2e-5


@pytest.mark.parametrize("text", ["12e", "e5", "1e5x", "v2e-5"])
def test_texts_of_yaml_stay_texts(words, text):
    assert words(f"target: {text}") == ["--target", text]


@pytest.mark.parametrize(
    ("text", "name"), [("", "run.yaml"), ("# nothing\n", "run.yaml"), ("", "run.toml")]
)
def test_an_empty_file_gives_nothing(words, text, name):
    assert words(text, name) == []


@pytest.mark.parametrize(
    ("text", "name", "complaint"),
    [
        ("bone_rr: 4", "run.yaml", "'bone_rr', which is no flag's name; did you mean bone_r"),
        ("zzz: 4", "run.yaml", "'zzz', which is no flag's name$"),
        ("1: 4", "run.yaml", "'1', which is no flag's name"),
        ("training:\n  bone_r: 4", "run.yaml", "'training', which is no flag's name"),
        ("bone_r:\n  a: 4", "run.yaml", "bone_r must be a text, a number, true or false, or a"),
        ("dataset_field: [[a]]", "run.yaml", "dataset_field must be a text, .* found list"),
        ("target: 2024-01-01", "run.yaml", "found date"),
        ("- bone_r", "run.yaml", "must hold flags by their names, as in `bone_r: 64`, found list"),
        ("bone_r", "run.yaml", "must hold flags by their names, .* found str"),
        ("bone_r: [", "run.yaml", "is not YAML: "),
        ("a: !!python/object/apply:os.getcwd []", "run.yaml", "is not YAML: "),
        ("bone_r: \x00", "run.yaml", "is not YAML: "),
        ("bone_r 64", "run.toml", "is not TOML: "),
        (b"\xff", "run.yaml", "is not UTF-8 text"),
        ("bone_r: 4", "run.json", "must end with .yaml, .yml or .toml"),
    ],
)
def test_what_is_no_file_of_flags_is_refused_in_one_line(words, text, name, complaint):
    with pytest.raises(ArgumentError, match=complaint) as caught:
        words(text, name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ArgumentError, match=r"absent\.yaml does not exist"):
        arguments_in(tmp_path / "absent.yaml", KNOWN)


def test_a_folder(tmp_path):
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(ArgumentError, match="can't be read: Is a directory"):
        arguments_in(tmp_path / "run.yaml", KNOWN)
