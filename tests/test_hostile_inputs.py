"""Files of strangers at every door: each is refused by a `DishaError`, in bounded time and memory.

`tests/fuzzing/doors.py` has the doors and the limits. Adapter files have more tests of their own.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct

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


NAMES = {"--config": "run.yaml", "data": "rows.jsonl"}
NO_FILES = {"pipe": pipe, "device": endless, "socket": listening, "folder": os.mkdir}
ALLOWED = {
    ("--prompt_file", "pipe"): "holds no prompt",
    ("--prompt_file", "device"): "is larger than 16,777,216 bytes",
    ("--prompt_file", "folder"): "Is a directory",
    ("--prompt_file", "socket"): "can't read",
    ("data", "folder"): "holds no data files",
    ("convert", "folder"): "is a folder without adapter_config.json",
    ("checkpoint", "folder"): "holds neither model.safetensors",
    ("base model", "folder"): "holds no config.json",
    ("tokenizer of GGUF", "folder"): "is a folder; the base model must be one GGUF file",
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
    member = gzip.compress((bytes(1023) + b"\n") * (15 * 2**10))
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
    told = in_child(refusal, "data", tmp_path / "rows.jsonl")
    assert "has a line of more than 67,108,864 bytes" in told


# --- GGUF ----------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(*values, tensors=(), rest=b"", counts=None):
    """Return a GGUF file of values as (key, type, bytes)."""
    count = counts or (len(tensors), len(values))
    pairs = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in values)
    return b"GGUF" + struct.pack("<IQQ", 3, *count) + pairs + b"".join(tensors) + rest


def array(kind, count, items=b""):
    return ("a", 9, struct.pack("<IQ", kind, count) + items)


def tensor(name, shape, kind=0, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


NUMBER, TEXT = 4, 8
ALIGNMENT = ("general.alignment", NUMBER, struct.pack("<I", 2**30))
GGUF = {
    "numbers without end": (gguf(array(NUMBER, 2**40)), "are missing"),
    "texts without end": (gguf(array(TEXT, 2**40)), "are missing"),
    "as many as the file has bytes": (gguf(array(TEXT, 9, bytes(71))), "are missing"),
    "more bytes than a number holds": (gguf(array(12, 2**63)), "are missing"),
    "a text without end": (gguf(rest=struct.pack("<Q", 2**62), counts=(0, 1)), "are missing"),
    "arrays in arrays": (
        gguf(array(9, 1, struct.pack("<IQ", 9, 1) * 5_000)),
        "it has arrays in an array",
    ),
    "padding of 10^9": (
        gguf(ALIGNMENT, tensors=[tensor("a", [])]),
        "general.alignment is 1073741824",
    ),
    "padding of nothing": (gguf(("general.alignment", NUMBER, bytes(4))), "general.alignment is 0"),
    "values without end": (gguf(counts=(0, 2**60)), "it claims 1,152,921,504,606,846,976 values"),
    "tensors without end": (gguf(counts=(2**60, 0)), "and 1,152,921,504,606,846,976 tensors"),
    "50,000 keys": (
        gguf(*((f"k{i}", NUMBER, bytes(4)) for i in range(50_000))),
        "it claims 50,000 values",
    ),
    "a key twice": (gguf(*[("a", NUMBER, bytes(4))] * 2), "'a' comes twice"),
    "a tensor twice": (gguf(tensors=[tensor("a", [])] * 2, rest=bytes(99)), "'a' comes twice"),
    "a tensor beyond the file": (
        gguf(tensors=[tensor("a", [2**40])]),
        "ends after the end of the file",
    ),
    "a tensor of 2^120 numbers": (gguf(tensors=[tensor("a", [2**60] * 2)]), "after the end"),
    "a tensor far away": (gguf(tensors=[tensor("a", [1], 0, 2**63)]), "after the end"),
    "dimensions without end": (gguf(rest=text("a") + b"\xff" * 99, counts=(1, 0)), "dimensions"),
    "a header of 40 MB": (
        lambda: gguf(array(NUMBER, 10**7, bytes(4 * 10**7))),
        "more than 33,554,432 bytes",
    ),
    "numbers of the largest header": (
        lambda: gguf(array(0, 33 * 10**6, bytes(33 * 10**6))),
        "architecture None",
    ),
    "texts of the largest header": (
        lambda: gguf(array(TEXT, 3 * 10**6, text("é") * 3 * 10**6)),
        "architecture None",
    ),
    "tensors of the largest header": (
        lambda: gguf(tensors=[tensor(str(i), [0] * 4) for i in range(100_000)], rest=bytes(99)),
        "architecture None",
    ),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648"),
    "no text": (gguf(("a", TEXT, struct.pack("<Q", 1) + b"\xff")), "can't decode byte"),
    "an unknown type": (gguf(("a", 77, bytes(99))), "unknown type 77"),
}
"""Hostile GGUF -> what is said of it."""


@pytest.mark.parametrize("which", GGUF)
def test_hostile_gguf(tmp_path, which):
    content, says = GGUF[which]
    holding(content() if callable(content) else content)(tmp_path / "model.gguf")
    assert says in in_child(refusal, "base model", tmp_path / "model.gguf")


def test_sizes_that_fill_memory_are_refused_before_lists_of_that_length_are_made(tmp_path):
    sizes = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "context_length": 8}
    values = {**sizes, "attention.head_count": 1, "attention.key_length": 2**30}
    for key in ("value_length", "rope.dimension_count"):
        values[key if "." in key else f"attention.{key}"] = 2**30
    numbers = [(f"llama.{key}", NUMBER, struct.pack("<I", one)) for key, one in values.items()]
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.scaling.factor": 2.0}
    numbers += [(f"llama.{key}", 6, struct.pack("<f", one)) for key, one in floats.items()]
    architecture = ("general.architecture", TEXT, text("llama"))
    embedding = tensor("token_embd.weight", [8, 8])
    content = gguf(architecture, *numbers, tensors=[embedding], rest=bytes(999))
    holding(content)(tmp_path / "model.gguf")
    told = in_child(refusal, "base model", tmp_path / "model.gguf")
    assert "the model's head_dim must be at most 1048576" in told


# --- tokenizers ----------------------------------------------------------------------------------

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPECIAL = {"<s>": {"id": "<s>", "ids": [0] * 10**5, "tokens": ["<s>"] * 10**5}}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(name, *steps):
    return {"type": "Sequence", name: list(steps)}


def template(pieces, special):
    whole = {"single": pieces, "pair": pieces, "special_tokens": special}
    return {"type": "TemplateProcessing", **whole}


TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}
MERGED = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]] * 1_100_000}
TOKENIZERS = {
    "a growing normaliser": (
        {"normalizer": sequence("normalizers", *[REPLACE] * 30)},
        "makes a text 1073741824 times as long",
    ),
    "a long replacement": (
        {"normalizer": {**REPLACE, "content": "a" * 10**6}},
        "makes a text 1000000 times as long",
    ),
    "before each character": (
        {"normalizer": {**REPLACE, "pattern": {"Regex": "b*"}, "content": "a" * 99}},
        "makes a text 100 times as long",
    ),
    "a regex": ({"pre_tokenizer": split("(a+)+$")}, "may try too many ways to match"),
    "a regex of three": ({"pre_tokenizer": split("a*a*a*b")}, "may try too many ways to match"),
    "a regex of a normaliser": (
        {"normalizer": {**REPLACE, "pattern": {"Regex": "(a|a)*b"}, "content": ""}},
        "may try too many ways to match",
    ),
    "bytes of bytes": (
        {"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 30)},
        "has ByteLevel 30 times",
    ),
    "steps without end": (
        {"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 10_000)},
        "has 10000 steps",
    ),
    "a template": (
        {"post_processor": template([{"SpecialToken": {"id": "<s>", "type_id": 0}}], SPECIAL)},
        "puts 100000 tokens around every text",
    ),
    "a text again and again": (
        {"post_processor": template([TEXT_PIECE] * 10**4, {})},
        "puts 159984 tokens around every text",
    ),
    "a growing decoder": (
        {"decoder": sequence("decoders", *[REPLACE] * 30)},
        "makes a text 1073741824 times as long",
    ),
    "padding of 10^9": (
        {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            }
        },
        "which token ends a text",  # the padding is left out
    ),
    "items without end": ({"model": MERGED}, "lists more than 2,000,000 items"),
    "numbers without end": ({"normalizer": [1] * 3 * 10**6}, "lists more than 2,000,000 items"),
    "deep": ({"normalizer": json.loads("[" * 500 + "]" * 500)}, "can't be read as a tokenizer"),
}
"""What a tokenizer.json holds -> what is said of it."""


@pytest.mark.parametrize("which", TOKENIZERS)
def test_hostile_tokenizers(tmp_path, which):
    parts, says = TOKENIZERS[which]
    holding(json.dumps(json.loads(TOKENIZER) | parts))(tmp_path / "tokenizer.json")
    assert says in in_child(refusal, "tokenizer", tmp_path)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (["a" * 10**6], "a token of 1,000,000 characters"),
        (
            [chr(256 + letter) * length for letter in range(5) for length in range(1, 1001)],
            "tokens that join in too many ways",
        ),
    ],
)
def test_hostile_vocabularies(tmp_path, tokens, says):
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    texts = b"".join(map(text, tokens))
    count = len(tokens)
    values = [
        ("general.architecture", TEXT, text("llama")),
        ("tokenizer.ggml.model", TEXT, text("llama")),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", TEXT, count) + texts),
        ("tokenizer.ggml.token_type", 9, struct.pack(f"<IQ{count}i", 5, count, *[1] * count)),
        ("tokenizer.ggml.scores", 9, struct.pack(f"<IQ{count}f", 6, count, *[0.0] * count)),
    ]
    holding(gguf(*values))(tmp_path / "model.gguf")
    assert says in in_child(refusal, "tokenizer of GGUF", tmp_path / "model.gguf")
