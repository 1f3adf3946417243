"""Files of strangers at every door: each is refused by a `DishaError`, in bounded time and memory.

`tests/fuzzing/doors.py` has the doors and the limits. Adapter files have more tests of their own.
"""

from __future__ import annotations

import gzip
import os
import socket

import pytest

from tests.fuzzing.children import in_child
from tests.fuzzing.doors import DOORS, refusal

MANY = 100_000


def pipe(path):
    os.mkfifo(path)  # which nobody writes to


def endless(path):
    path.symlink_to("/dev/zero")


def listening(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))
    server.close()


def holding(content):
    def write(path):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def beside(name, content, index=None):
    """Return what makes a folder with a file of that content."""

    def write(path):
        path.mkdir()
        content(path / name) if callable(content) else holding(content)(path / name)

    return write


def sparse(size, start=b""):
    def write(path):
        path.write_bytes(start)
        os.truncate(path, size)

    return write


NAMES = {"--config": "run.yaml", "data": "rows.jsonl", "streamed data": "rows.jsonl"}
NO_FILES = {"pipe": pipe, "device": endless, "socket": listening, "folder": os.mkdir}
ALLOWED = {
    ("--prompt_file", "pipe"): "holds no prompt",
    ("--prompt_file", "device"): "is larger than 16,777,216 bytes",
    ("--prompt_file", "folder"): "Is a directory",
    ("--prompt_file", "socket"): "can't read",
    ("data", "folder"): "holds no data files",
    ("streamed data", "folder"): "holds no data files",
    ("convert", "folder"): "is a folder without adapter_config.json",
    ("checkpoint", "folder"): "holds neither model.safetensors",
    ("base model", "folder"): "holds no config.json",
    ("tokenizer", "folder"): "there is no tokenizer at",
}
"""What a door says that does not say "not a regular file"."""


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_regular_file(tmp_path, monkeypatch, door, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = tmp_path / NAMES.get(door, "file")
    NO_FILES[kind](path)
    says = ALLOWED.get((door, kind), f"it is a {kind}, not a regular file")
    assert says in in_child(refusal, door, path)


DEEP = "[" * MANY
INSIDE = '{"a": ' + "[" * 900 + "]" * 900 + "}"
CONFIGS = {
    "deep": (DEEP, "is not valid JSON"),
    "deep enough to be read but not shown": (INSIDE, "more than 100 lists and objects inside"),
    "wide": ('{"a": [' + "{}," * (5 * 10**6) + "{}]}", "more than 1,000,000 lists and objects"),
    "a number without end": ('{"a": ' + "9" * MANY + "}", "is not valid JSON"),
    "half a character": ('{"a": "\\ud800"}', "half of a surrogate pair"),
    "a name twice": ('{"a": 1, "a": 1}', "'a' comes twice"),
    "an endless device": (endless, "it is a device, not a regular file"),
    "a pipe": (pipe, "it is a pipe, not a regular file"),
    "tons": (sparse(2**40), "is larger than"),
    "no text": (b"\xff\xfe\xfa", "is not valid JSON"),
    "no object": ("[]", "must be a JSON object"),
}
"""Hostile JSON -> what is said of it."""

TOKENIZER = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
MODEL = {"config.json": "{}", "model.safetensors": bytes([2, *bytes(7)]) + b"{}"}
JSON_DOORS = {
    "checkpoint": ("model.safetensors.index.json", {}),
    "base model": ("config.json", MODEL),
    "tokenizer": ("tokenizer_config.json", {"tokenizer.json": TOKENIZER}),
    "convert": ("adapter_config.json", {}),
}
"""Door -> the file of JSON that it reads in a folder, and what else is there."""


@pytest.mark.parametrize("which", CONFIGS)
@pytest.mark.parametrize("door", JSON_DOORS)
def test_hostile_json(tmp_path, door, which):
    content, says = CONFIGS[which]
    name, others = JSON_DOORS[door]
    for other, text in others.items():
        holding(text)(tmp_path / other)
    (tmp_path / name).unlink(missing_ok=True)
    (content if callable(content) else holding(content))(tmp_path / name)
    assert says in in_child(refusal, door, tmp_path)


FLAGS = {
    "a number without end": ("bone_r: " + "9" * 20_000, "is not YAML"),
    "in base 16": ("bone_r: 0x" + "f" * 20_000, "bone_r must be a text, a number"),
    "in base 60": ("bone_r: 1" + ":1" * 10_000, "bone_r must be a text, a number"),
    "50,000 keys": ("".join(f"k{i}: 1\n" for i in range(50_000)), "larger than 32,768 bytes"),
    "5,000 keys": ("".join(f"k{i}: 1\n" for i in range(3_000)), "'k0', which is not a flag"),
    "deep": ("bone_r: " + "[" * 20_000, "is not YAML"),
    "growing": (
        "bone_r: [&a0 [x, x, x]"
        + "".join(f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
        + "]",
        "bone_r must be a text, a number",
    ),
    "a key twice": ("bone_r: 4\nbone_r: 8", "comes twice"),
    "a tag of another type": ("bone_r: !!bool x", "is not YAML"),
    "a date that is none": ("bone_r: !!timestamp x", "is not YAML"),
}
"""Hostile YAML -> what is said of it."""


@pytest.mark.parametrize("which", FLAGS)
def test_hostile_flags(tmp_path, which):
    content, says = FLAGS[which]
    holding(content)(tmp_path / "run.yaml")
    assert says in in_child(refusal, "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [("bone_r = 0x" + "f" * 20_000, "bone_r must be"), ("bone_r = " + "[" * 20_000, "is not TOML")],
)
def test_hostile_flags_in_toml(tmp_path, content, says):
    holding(content)(tmp_path / "run.toml")
    assert says in in_child(refusal, "--config", tmp_path / "run.toml")


def bomb(path):
    """15 MB that unpack to 15 GB: one member of 15 MB again and again."""
    member = gzip.compress(bytes(15 * 2**20))
    path.write_bytes(member * 1000)


DATA = {
    "growing": ("rows.jsonl.gz", bomb, "unpacks to more than 100 times its size"),
    "deep": ("rows.json", DEEP, "is not JSON"),
    "deep rows": ("rows.json", f"[{INSIDE}]", ""),
    "a number without end": ("rows.json", "9" * MANY, "is not JSON"),
}
"""Hostile rows -> the file's name, its content and what is said of it."""


@pytest.mark.parametrize("which", DATA)
def test_hostile_rows(tmp_path, which):
    name, content, says = DATA[which]
    (content if callable(content) else holding(content))(tmp_path / name)
    assert says in in_child(refusal, "data", tmp_path / name)


def test_a_line_without_end(tmp_path):
    sparse(2**36, b'{"query": "')(tmp_path / "rows.jsonl")
    told = in_child(refusal, "streamed data", tmp_path / "rows.jsonl")
    assert "has a line of more than 67,108,864 bytes" in told
