"""Hostile adapter files, each made from its number alone: `craft(number)` is the same anywhere.

A recipe takes a valid file apart and puts it together wrong. The first numbers go through all
recipes once; after them chance chooses, by the recipes' weights.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from disha.functional import METHODS, PATTERNS, Geometry
from tests.fuzzing.carrier import Draft, Pairs, Raw, Tensor, container, to_text
from tests.fuzzing.subject import seed_files

__all__ = ["RECIPES", "Case", "craft"]

Recipe = Callable[[random.Random, Draft], bytes | None]
"""Changes the draft, or returns the bytes of a file of its own."""


@dataclass(frozen=True)
class Case:
    """A file, the recipe that made it, and which of the subject's adapters it is made from."""

    number: int
    recipe: str
    which: int
    data: bytes

    @property
    def random(self) -> random.Random:
        """What else the case decides by chance, the same each time."""
        return random.Random(f"trial {self.number}")


RECIPES: dict[str, tuple[Recipe, float]] = {}

LARGE = 100_000
"""How many of something makes a file large; smaller where that is asked for."""


def recipe(weight: float = 1.0) -> Callable[[Recipe], Recipe]:
    """Add a recipe under its function's name."""

    def add(function: Recipe) -> Recipe:
        RECIPES[function.__name__.replace("_", " ")] = (function, weight)
        return function

    return add


def craft(number: int, seed: int = 0, large: int = LARGE) -> Case:
    """Return a case.

    Args:
        number: its number, from 0.
        seed: another gives other files.
        large: how many of something makes a file large.
    """
    rng = random.Random(f"{seed} {number}")
    names = list(RECIPES)
    if number < len(names):
        name = names[number]
    else:
        (name,) = rng.choices(names, [weight for _, weight in RECIPES.values()])
    which = rng.randrange(len(seed_files()))
    draft = Draft.of(seed_files()[which])
    draft.large = large
    data = RECIPES[name][0](rng, draft)
    return Case(number, name, which, draft.file() if data is None else data)


# --- odd things ----------------------------------------------------------------------------------

NAMES = (
    "", ".", "..", "...", "a.", ".a", "head.", "head..weight", "disha", "__class__", "forward",
    "__metadata__", "../../../etc/passwd", "/etc/passwd", "C:\\windows", "\\\\server\\share",
    "a\0b", "\0", "a\nb", "\r\n", "\x1b[2J\x1b[31mred", "\u202egnp.exe", "\ufeff", "é", "e\u0301",
    "\U0001f600", "\ufb00", "\u0131", "\u2028", "%s%n", "{0}", "${HOME}", "$(id)", "a" * 300,
    "head.weight", "embed.weight", "steps", "body", "body.2", "body.0", "last", "body.1", "attn",
    "attn.q_proj", "attn.out_proj", "attn.in_proj_weight", "copy.deepcopy", "head.disha",
    "head.disha.default", "head.disha.default.bone_block", "head.bone_block", "bone_block",
    "module.head", "_orig_mod.head", "HEAD", " head", "head ",
)  # fmt: skip

REGEXES = (
    "(a+)+$", "(a|a)*b", "(.*)*" * 20 + "x", "(?i)" + "[\\x00-\\uffff]" * 2000, "(" * 5000, "[",
    "*", "(?P<a>.)(?P<a>.)", "\\", "(?<=a+)b", "a{65536}" * 50, "(?:a{0,60000}){0,60000}", ".*",
    "", "x" * 100_000, "|".join(map(str, range(20_000))), "(?i)" + "\u017f" * 1000,
)  # fmt: skip


def _deep(rng: random.Random) -> Raw:
    depth = rng.choice((2, 60, 127, 128, 129, 300, rng.randrange(900, 1100), 100_000))
    return Raw(rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))


def odd(rng: random.Random) -> Any:
    """Return a JSON value that does not belong anywhere."""
    return rng.choice(
        (
            lambda: rng.choice((None, True, False, 0, -1, 1, 2, 3, 4, 7, 8, 1.0, 0.5, -0.0)),
            lambda: rng.choice((2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63))),
            lambda: Raw(rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "-1e-999", "1E5"))),
            lambda: Raw("9" * rng.choice((4299, 4301, 100_000))),
            lambda: Raw(rng.choice(("tru", "01", "+1", "'a'", '"\\ud800"', '"\\x"', '"', "", "{"))),
            lambda: rng.choice(NAMES),
            lambda: rng.choice(REGEXES),
            lambda: rng.choice((*METHODS, "miss", "lora", "zeros", "float32", "1", *PATTERNS)),
            lambda: rng.choice(([], {}, [[]], [None], {"": None}, {"a": {}}, [1, "a", {}])),
            lambda: [rng.choice(NAMES) for _ in range(rng.randrange(5))],
            lambda: {rng.choice(NAMES): rng.choice((1, 4, -1, "a", None)) for _ in range(3)},
            lambda: rng.choice((1e-45, 1e38, 3.4e38, 3.5e38, 1e308, -1e38, 1e-320)),
            lambda: _deep(rng),
        )
    )()  # fmt: skip


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over the (container, key) of everything in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def _retyped(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice((0, 1, "true", "null", [], "None"))
    if isinstance(value, (int, float)):
        return rng.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 2,
                str(value),
                [value],
                value == 1,
                Raw(f"{value}.0" if isinstance(value, int) else "1"),
            )
        )
    if isinstance(value, str):
        return rng.choice(
            (value + "x", value[:-1], value.upper(), [value], {value: 1}, value + "\0", value * 50)
        )
    if isinstance(value, dict):
        return rng.choice(
            (Pairs([*value.items(), *value.items()]), list(value), None, list(value.items()))
        )
    if isinstance(value, list):
        return rng.choice((value * 2, value[1:], dict.fromkeys(map(str, value), 1), str(value)))
    return None


# --- bytes ---------------------------------------------------------------------------------------


@recipe(0.5)
def untouched(rng: random.Random, draft: Draft) -> bytes | None:
    return None


@recipe(3)
def flipped_bits_in_header(rng: random.Random, draft: Draft) -> bytes:
    data = bytearray(draft.file())
    stop = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(8, stop)] ^= 1 << rng.randrange(8)
    return bytes(data)


@recipe(1)
def flipped_bits_in_data(rng: random.Random, draft: Draft) -> bytes:
    data = bytearray(draft.file())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 4, 64))):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@recipe(1)
def flipped_bits_in_length(rng: random.Random, draft: Draft) -> bytes:
    data = bytearray(draft.file())
    data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    return bytes(data)


@recipe(1)
def truncated(rng: random.Random, draft: Draft) -> bytes:
    data = draft.file()
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(20), len(data) - 1))]


@recipe(0.5)
def longer(rng: random.Random, draft: Draft) -> bytes:
    return draft.file() + rng.randbytes(rng.choice((1, 4, 8, 5000)))


@recipe(1)
def cut_and_pasted(rng: random.Random, draft: Draft) -> bytes:
    data, other = draft.file(), rng.choice(seed_files())
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    c, d = sorted(rng.randrange(len(other)) for _ in range(2))
    piece = rng.choice((b"", data[a:b] * 2, bytes(b - a), rng.randbytes(b - a), other[c:d]))
    return data[:a] + piece + data[b:]


@recipe(1)
def header_length_lies(rng: random.Random, draft: Draft) -> bytes:
    items, data = draft.index()
    header = to_text(Pairs(items)).encode()
    length = rng.choice(
        (0, 1, 2, 8, len(header) - 1, len(header) + 1, len(header) + 8, len(header) + len(data),
         len(header) + len(data) + 1, 100_000_000, 100_000_001, 2**31, 2**32 + len(header),
         2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 2**64 - 9)
    )  # fmt: skip
    return container(header, data, length)


@recipe(0.5)
def another_kind_of_file(rng: random.Random, draft: Draft) -> bytes:
    junk = rng.randbytes(rng.choice((0, 1, 7, 8, 9, 64, 4096)))
    magic = rng.choice(
        (b"", b"\x80\x04\x95", b"PK\x03\x04", b"GGUF\x03\0\0\0", b"\x93NUMPY\x01\0", b"\x7fELF",
         b"{", b"\xef\xbb\xbf{}", b"\x1f\x8b", b"\x89HDF\r\n\x1a\n", bytes(64), b"\xff" * 64,
         struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]")
    )  # fmt: skip
    return magic + junk


# --- the safetensors header ----------------------------------------------------------------------


@recipe(3)
def odd_value_in_index(rng: random.Random, draft: Draft) -> bytes:
    items, data = draft.index()
    entries = dict(items[1:])
    for _ in range(rng.choice((1, 1, 3))):
        where, key = rng.choice(list(_places(entries)))
        where[key] = rng.choice((odd(rng), _retyped(rng, where[key])))
    return _file([items[0], *entries.items()], data)


@recipe(2)
def tensors_twice_or_overlapping(rng: random.Random, draft: Draft) -> bytes:
    items, data = draft.index()
    entries = dict(items[1:])
    a, b = rng.choice(list(entries)), rng.choice(list(entries))
    size = len(data)
    change = rng.randrange(7)
    if change == 0:
        items.append((a, entries[b]))
    elif change == 1:
        entries[a]["data_offsets"] = entries[b]["data_offsets"]
    elif change == 2:
        entries[a]["data_offsets"] = [
            v + rng.choice((-4, -1, 1, 4)) for v in entries[a]["data_offsets"]
        ]
    elif change == 3:
        entries[a]["data_offsets"] = entries[a]["data_offsets"][::-1]
    elif change == 4:
        entries[a]["data_offsets"] = rng.choice(([0, size], [size, size], [0, 2**64 - 1], [0]))
    elif change == 5:
        items.append(("__metadata__", rng.choice(({}, {"disha": "{}"}, items[0][1]))))
    else:
        items.insert(1, (rng.choice(NAMES), entries[a]))
        data += data[slice(*entries[a]["data_offsets"])]
    return _file(items, data)  # fmt: skip


@recipe(2)
def odd_shapes(rng: random.Random, draft: Draft) -> None:
    for _ in range(rng.choice((1, 2))):
        tensor = draft.tensors[rng.choice(list(draft.tensors))]
        count = math.prod(tensor.shape)
        tensor.shape = rng.choice(
            (
                [2**32, 2**32], [2**63], [2**64 - 1], [0], [0, 2**62], [0, 2**63], [2**64 - 1, 0],
                [2**62, 0, 2**62], [count], [count, 1], [1] * 70 + [count], [1] * 5000 + [count],
                [], tensor.shape[::-1], [*tensor.shape, 1], [-1, count], [0] * 100, [1.0, count],
            )
        )  # fmt: skip
        if 0 in tensor.shape and rng.random() < 0.8:
            tensor.data = b""


@recipe(2)
def odd_dtypes(rng: random.Random, draft: Draft) -> None:
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
             "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
             "F8_E8M0": 1, "C64": 8, "F4": 1, "F6_E2M3": 1, "f32": 4, "": 4}  # fmt: skip
    for key in rng.sample(list(draft.tensors), rng.randrange(1, len(draft.tensors) + 1)):
        tensor = draft.tensors[key]
        old, tensor.dtype = sizes[tensor.dtype], rng.choice(list(sizes))
        if rng.random() < 0.8:
            count = len(tensor.data) // old
            tensor.data = rng.choice((bytes, rng.randbytes))(count * sizes[tensor.dtype])


@recipe(1)
def odd_metadata(rng: random.Random, draft: Draft) -> bytes | None:
    change = rng.randrange(4)
    if change == 0:
        draft.beside = {rng.choice(NAMES): rng.choice(NAMES) for _ in range(4)}
        return None
    items, data = draft.index()
    ours = to_text(draft.header)
    others = (
        odd(rng), {}, None, [], {"disha": odd(rng)}, {"disha": draft.header}, {"DISHA": ours},
        Pairs([("disha", ours), ("disha", "{}")]), {"disha": ours[: rng.randrange(len(ours))]},
        {"disha": ours + rng.choice((" ", "}", "\0", "{}", "\n"))}, {"disha": ""},
        {"disha": to_text(_deep(rng))}, {"disha": json.dumps(ours)}, {"disha": "\ufeff" + ours},
    )  # fmt: skip
    items[0] = ("__metadata__", rng.choice(others))
    return _file(items, data)


@recipe(1)
def odd_keys(rng: random.Random, draft: Draft) -> None:
    keys = list(draft.tensors)
    for key in rng.sample(keys, rng.randrange(1, len(keys) + 1)):
        suffix = rng.choice(
            ("", ".bone_block", ".bat_block", ".weight", ".disha.default.bone_block")
        )
        draft.tensors[rng.choice(NAMES) + suffix] = draft.tensors.pop(key)


def _file(items: list[tuple[str, Any]], data: bytes) -> bytes:
    return container(to_text(Pairs(items)).encode(), data)


# --- our header ----------------------------------------------------------------------------------


@recipe(6)
def odd_value_in_header(rng: random.Random, draft: Draft) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where, key = rng.choice([p for p in _places(draft.header) if not isinstance(p[0], Pairs)])
        where[key] = rng.choice((odd(rng), odd(rng), _retyped(rng, where[key])))


@recipe(3)
def odd_value_in_config(rng: random.Random, draft: Draft) -> None:
    config = draft.header["config"]
    for _ in range(rng.choice((1, 1, 2))):
        config[rng.choice(list(config))] = odd(rng)


@recipe(2)
def strange_regexes(rng: random.Random, draft: Draft) -> None:
    config, regex = draft.header["config"], rng.choice(REGEXES)
    name = rng.choice(("target", "exclude", "rank_pattern", "also_train"))
    config[name] = {
        "target": regex,
        "exclude": [regex] * rng.choice((1, 3)),
        "also_train": [regex],
        "rank_pattern": {regex: 2},
    }[name]


@recipe(2)
def fields_gone_or_renamed(rng: random.Random, draft: Draft) -> None:
    where, key = rng.choice([p for p in _places(draft.header) if isinstance(p[0], dict)])
    value = where.pop(key)
    if rng.random() < 0.5:
        where[rng.choice((key.upper(), key + " ", rng.choice(NAMES)))] = value


@recipe(1)
def unknown_fields(rng: random.Random, draft: Draft) -> None:
    objects = [draft.header, draft.header["config"], *draft.header["layers"]]
    rng.choice(objects)[rng.choice((*NAMES, "future", "pickle", "code"))] = odd(rng)


@recipe(1)
def fields_twice(rng: random.Random, draft: Draft) -> None:
    header = draft.header
    key = rng.choice(list(header))
    again = rng.choice((header[key], odd(rng), _retyped(rng, header[key])))
    draft.header = Pairs([*header.items(), (key, again)])


@recipe(1)
def swapped_values(rng: random.Random, draft: Draft) -> None:
    (a, i), (b, j) = rng.sample([p for p in _places(draft.header) if p[0] is not p[1]], 2)
    x, y = a[i], b[j]
    if not (_within(x, b) or _within(y, a)):
        a[i], b[j] = y, x


def _within(tree: Any, part: Any) -> bool:
    if tree is part:
        return True
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return any(_within(one, part) for one in below)


@recipe(1)
def other_format(rng: random.Random, draft: Draft) -> None:
    draft.header["format"] = rng.choice((0, 1, 2, -1, 2**70, 1.0, True, "1", None, [1], Raw("1e0")))


@recipe(1)
def header_of_another_file(rng: random.Random, draft: Draft) -> None:
    draft.header = Draft.of(rng.choice(seed_files())).header


@recipe(1)
def header_cut_off(rng: random.Random, draft: Draft) -> None:
    text = to_text(draft.header)
    a, b = sorted(rng.randrange(len(text)) for _ in range(2))
    draft.header = Raw(rng.choice((text[:b], text[:a] + text[b:], text[a:], text[:b] + text[a:])))


# --- coherent lies -------------------------------------------------------------------------------


def _layers(draft: Draft) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = draft.header["layers"]
    return layers


def _key(draft: Draft, name: str) -> str:
    block = f"{draft.header['config']['method']}_block"
    return f"{name}.{block}" if name else block


def _add_layer(draft: Draft, name: str, like: dict[str, Any], tensor: Tensor) -> None:
    _layers(draft).append({**like, "name": name})
    draft.tensors[_key(draft, name)] = tensor


def _a_layer(rng: random.Random, draft: Draft) -> tuple[dict[str, Any], Tensor]:
    layer = rng.choice(_layers(draft))
    return layer, draft.tensors[_key(draft, layer["name"])]


@recipe(2)
def layers_that_are_not_there(rng: random.Random, draft: Draft) -> None:
    layer, tensor = _a_layer(rng, draft)
    for name in rng.sample(NAMES, rng.choice((1, 2, 5))):
        _add_layer(draft, name, layer, tensor)


@recipe(1)
def one_layer_by_two_names(rng: random.Random, draft: Draft) -> None:
    layer = next((one for one in _layers(draft) if one["name"] == "body.1"), None)
    if layer is not None:
        tensor = draft.tensors[_key(draft, "body.1")]
        other = Tensor(tensor.dtype, tensor.shape, bytes(len(tensor.data)))
        _add_layer(draft, "last", layer, rng.choice((tensor, other)))
        if rng.random() < 0.5:
            _layers(draft).remove(layer)
            draft.tensors.pop(_key(draft, "body.1"))


@recipe(3)
def parameters_beside(rng: random.Random, draft: Draft) -> None:
    """Parameters of the model, listed or not, with the right shapes or not."""
    shapes = {
        "head.weight": [12, 8], "embed.weight": [12, 8], "norm.weight": [8], "norm.bias": [8],
        "body.0.weight": [8, 8], "body.0.bias": [8], "body.1.bias": [8], "last.bias": [8],
        "attn.in_proj_weight": [24, 8], "attn.out_proj.bias": [8], "conv.weight": [8, 8, 3],
        "steps": [3], "attn.q_proj.weight": [8, 8], "body.0.disha.default.bone_block": [3, 8],
        "body.0.disha.other.bone_block": [3, 8], "body.0.bone_block": [3, 8],
    }  # fmt: skip
    for name in rng.sample(list(shapes), rng.choice((1, 2, 6))):
        shape = [*shapes[name], 1] if rng.random() < 0.1 else shapes[name]
        count = math.prod(shape)
        if name not in draft.tensors:
            values = [rng.uniform(-1, 1) for _ in range(count)]
            draft.tensors[name] = Tensor("F32", shape, struct.pack(f"<{count}f", *values))
        if rng.random() < 0.8:
            draft.header["also_train"].append(name)


@recipe(1)
def blocks_listed_beside(rng: random.Random, draft: Draft) -> None:
    keys = [key for key in draft.tensors if key.endswith("_block")]
    draft.header["also_train"] += rng.sample(keys, rng.randrange(1, len(keys) + 1))
    if rng.random() < 0.3:
        draft.header["also_train"].append(rng.choice(keys))


@recipe(2)
def other_sizes(rng: random.Random, draft: Draft) -> None:
    """Sizes in the header that lie, some with a block that agrees with them."""
    layer, tensor = _a_layer(rng, draft)
    field = rng.choice(("r", "in", "out", "scale", "groups", "padding_idx", "layout", "rows"))
    layer[field] = rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 12, 2**31 - 1, 2**31, "bat", "bone", None))
    if field == "layout":
        layer[field] = rng.choice(PATTERNS)
    if field == "rows":
        stops = (0, 1, 4, 6, 8, 12, 2**31 - 1, 2**31, 2**63, -1)
        layer[field] = [[rng.choice(stops), rng.choice(stops)] for _ in range(rng.choice((1, 2)))]
        if rng.random() < 0.7:
            layer["out"] = sum(stop - first for first, stop in layer[field])
    if rng.random() < 0.3:
        draft.header["config"]["r_out"] = rng.choice((1, 2, 3, 4, 5, 2**31, "4", None))
    if rng.random() < 0.5 and all(isinstance(layer[f], int) for f in ("r", "out")):
        width = {"F64": 8, "F32": 4}.get(tensor.dtype, 2)
        r, out = (max(1, min(layer[size], 50)) for size in ("r", "out"))
        method = METHODS[draft.header["config"]["method"]]
        tensor.shape = list(method.shape(Geometry(r, out), r, None))
        tensor.data = bytes(math.prod(tensor.shape) * width)


@recipe(2)
def extreme_values(rng: random.Random, draft: Draft) -> None:
    """Values that are not finite, or not in the dtype that they are loaded into."""
    codes = {"F64": "<d", "F32": "<f", "F16": "<e"}
    tensor = draft.tensors[rng.choice(list(draft.tensors))]
    at = rng.randrange(math.prod(tensor.shape))
    value = rng.choice((math.nan, math.inf, -math.inf, 1e-40, -0.0, 65504.0, 3e38, 1e300))
    if tensor.dtype == "BF16":
        piece = rng.choice((b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x7f\x7f", b"\x01\x00"))
    else:
        code = codes[tensor.dtype]
        limit = {"<f": 3e38, "<e": 65504.0}.get(code, math.inf)
        finite = math.isfinite(value)
        piece = struct.pack(code, max(-limit, min(limit, value)) if finite else value)
    data = bytearray(tensor.data)
    data[at * len(piece) : (at + 1) * len(piece)] = piece
    tensor.data = bytes(data)


@recipe(1)
def extreme_scales(rng: random.Random, draft: Draft) -> None:
    scales = (0, 0.0, -1, 3.4e38, -3.4e38, 3.5e38, 1e-45, 1e-320, Raw("NaN"), Raw("-Infinity"),
              10**38, 10**39, True, "1", Raw("1" * 4000))  # fmt: skip
    for layer in _layers(draft):
        layer["scale"] = rng.choice(scales)
    if rng.random() < 0.5:
        draft.header["config"]["scale"] = rng.choice(scales)


@recipe(1)
def mixed_methods(rng: random.Random, draft: Draft) -> None:
    other = Draft.of(rng.choice(seed_files()))
    here = {layer["name"] for layer in _layers(draft)}
    for layer in _layers(other):
        if layer["name"] not in here:
            _add_layer(draft, layer["name"], layer, other.tensors[_key(other, layer["name"])])
    if rng.random() < 0.3:
        draft.header["config"]["method"] = rng.choice(tuple(METHODS))


@recipe(1)
def another_models_layers(rng: random.Random, draft: Draft) -> None:
    """Every layer under a prefix: for another model, but coherent."""
    prefix = rng.choice(("model.", "module.", "_orig_mod.", "a" * 5000 + ".", "\x1b[2J."))
    keys = {_key(draft, layer["name"]) for layer in _layers(draft)}
    for layer in _layers(draft):
        layer["name"] = prefix + layer["name"]
    draft.tensors = {
        (prefix if key in keys else "") + key: tensor for key, tensor in draft.tensors.items()
    }


@recipe(1)
def other_fingerprints(rng: random.Random, draft: Draft) -> None:
    for layer in _layers(draft):
        layer["base"] = rng.choice(("", "0", "0" * 16, "x" * 5000, "\x1b[2J", None, "é"))


@recipe(1)
def notes(rng: random.Random, draft: Draft) -> None:
    chosen = rng.sample(NAMES, 5)
    draft.header["metadata"] = dict(zip(chosen, reversed(chosen), strict=True))
    if rng.random() < 0.3:
        draft.header["metadata"]["surrogate"] = "\ud800"


# --- large files ---------------------------------------------------------------------------------

RARE = 0.03
"""Large files take seconds, so few are made."""


def _tiny(draft: Draft) -> tuple[dict[str, Any], Tensor]:
    """Return a layer, yet without a name, of the smallest that a block can be for; and a block."""
    config = draft.header["config"]
    out = config["r_out"] or 1
    layer = {"layout": "out in", "r": 1, "in": 1, "out": out, "scale": 1.0}
    shape = list(METHODS[config["method"]].shape(Geometry(1, out), 1, config["r_out"]))
    return layer, Tensor("F32", shape, bytes(4 * math.prod(shape)))


@recipe(RARE)
def many_tensors_not_described(rng: random.Random, draft: Draft) -> None:
    for i in range(draft.large):
        draft.tensors[f"layer.{i}.bone_block"] = Tensor("F32", [0], b"")


@recipe(RARE)
def many_layers(rng: random.Random, draft: Draft) -> None:
    layer, tensor = _tiny(draft)
    for i in range(draft.large):
        _add_layer(draft, f"layers.{i}.mlp", {**layer, "base": "0123456789abcdef"}, tensor)


@recipe(RARE)
def many_beside(rng: random.Random, draft: Draft) -> None:
    names = [f"norms.{i}.weight" for i in range(draft.large)]
    draft.header["also_train"] += names
    draft.tensors |= dict.fromkeys(names, Tensor("F32", [0], b""))


@recipe(RARE)
def many_missing(rng: random.Random, draft: Draft) -> None:
    draft.header["also_train"] += [f"norms.{i}.weight" for i in range(draft.large)]


@recipe(RARE)
def many_notes(rng: random.Random, draft: Draft) -> None:
    draft.header["metadata"] = {f"note {i}": "x" * (i % 9) for i in range(draft.large)}


@recipe(RARE)
def many_regexes(rng: random.Random, draft: Draft) -> None:
    config = draft.header["config"]
    name = rng.choice(("exclude", "also_train", "rank_pattern"))
    regexes = [f"l{i}[a-z]+(x|y)*" for i in range(draft.large)]
    config[name] = dict.fromkeys(regexes, 2) if name == "rank_pattern" else regexes


@recipe(RARE)
def long_names(rng: random.Random, draft: Draft) -> None:
    layer, tensor = _a_layer(rng, draft)
    long = "".join(rng.choices("abcdefgh.", k=draft.large * 10))
    if rng.random() < 0.5:
        _add_layer(draft, long, layer, tensor)
    else:
        draft.header["also_train"].append(long)
        draft.tensors[long] = tensor
    draft.header["metadata"][long] = long


@recipe(RARE)
def one_long_name_among_many(rng: random.Random, draft: Draft) -> None:
    """What pads a table's cells to the longest would take the product of both."""
    many_layers(rng, draft)
    _add_layer(draft, "x" * draft.large, *_tiny(draft))


@recipe(RARE)
def floods(rng: random.Random, draft: Draft) -> None:
    """JSON that takes far more memory than room."""
    pieces = ("[]", "{}", '""', "1e1", "300", '{"a":1}', "[[]]", '"ab"', "null", '"\\""')
    flood = Raw("[" + ",".join([rng.choice(pieces)] * (draft.large * 20)) + "]")
    if rng.random() < 0.2:
        flood = Raw("{" + ",".join(f'"{i:x}":0' for i in range(draft.large * 10)) + "}")
    field = rng.choice(("layers", "also_train", "metadata", "config", "flood"))
    where = rng.choice((draft.header, draft.header["config"], _layers(draft)[0]))
    where[field] = flood


@recipe(RARE)
def floods_in_index(rng: random.Random, draft: Draft) -> bytes:
    items, data = draft.index()
    piece = rng.choice(("[]", "{}", '""', "1e1", "300", "null", "0"))
    flood = Raw("[" + ",".join([piece] * (draft.large * 20)) + "]")
    entry = items[-1][1]
    entry[rng.choice(("flood", "shape", "data_offsets", "dtype"))] = flood
    return _file(items, data)


@recipe(RARE)
def many_dimensions(rng: random.Random, draft: Draft) -> None:
    tensor = draft.tensors[rng.choice(list(draft.tensors))]
    tensor.shape = [1] * (draft.large * 10) + tensor.shape


assert all(re.fullmatch(r"[a-z ]+", name) for name in RECIPES)
