"""A reader of adapter files, written from docs/format.md alone: slow, obvious, and all by hand.

It uses neither disha nor safetensors nor torch, so that what it finds in a file, and what it makes
of it, is there by the format and not by the library. `read` checks what the page says that a reader
has to refuse, up to the model; `merged` gives the weights of a model with the adapter in them.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
LAYOUTS = (
    *("out in", "in out", "index out", "out in *kernel", "in out *kernel"),
    *("expert out in", "expert in out"),
)
LARGEST = 3.4028234663852886e38
REQUIRED = object()


class Refused(Exception):
    """The file is none of format 1."""


def need(condition, problem):
    if not condition:
        raise Refused(problem)


@dataclass
class Layer:
    method: str
    r_out: int | None
    name: str
    layout: str
    r: int
    inputs: int
    outputs: int
    scale: float
    groups: int
    padding_idx: int | None
    rows: list
    base: str | None

    @property
    def key(self):
        return f"{self.name}.{self.method}_block" if self.name else f"{self.method}_block"


@dataclass
class Adapter:
    text: str
    layers: list
    also_train: list
    metadata: dict
    dtypes: dict
    tensors: dict


# --- container -----------------------------------------------------------------------------------


def without_repeats(pairs):
    need(len({name for name, _ in pairs}) == len(pairs), "a field twice")
    return dict(pairs)


def no_number(text):
    raise Refused(f"{text} is no JSON")


def parsed(text):
    try:
        value = json.loads(text, object_pairs_hook=without_repeats, parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused("no JSON") from error
    need(isinstance(value, dict), "no object")
    return value


def container(data):
    """Return the text of the header, dtypes by key, and values by key as bytes with a shape."""
    need(len(data) >= 8, "no length")
    (length,) = struct.unpack("<Q", data[:8])
    need(8 + length <= len(data), "the length is larger than the file")
    try:
        entries = parsed(data[8 : 8 + length].decode())
    except UnicodeDecodeError as error:
        raise Refused("no UTF-8") from error
    values = data[8 + length :]
    metadata = entries.pop("__metadata__", {})
    need("disha" in metadata, "no header")
    position, raw = 0, {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        need(entry["dtype"] in SIZES, "another dtype")
        count = 1
        for size in entry["shape"]:
            count *= size
        need(begin == position, "a gap or an overlap")
        need(end - begin == count * SIZES[entry["dtype"]], "shape and offsets disagree")
        raw[key] = (values[begin:end], tuple(entry["shape"]))
        position = end
    need(position == len(values), "bytes left over, or too few")
    said = metadata.get("disha_checksum")
    if said is not None:
        found = checksum(metadata["disha"], {key: entries[key]["dtype"] for key in raw}, raw)
        need(said == found, "the checksum is wrong")
    return metadata["disha"], {key: entries[key]["dtype"] for key in raw}, raw


def checksum(header, dtypes, raw):
    parts = [(header, b"")]
    for key in sorted(raw):
        values, shape = raw[key]
        parts.append((f"{dtypes[key]} {in_brackets(shape)} {key}", values))
    digest = hashlib.sha256()
    for text, values in parts:
        digest.update(struct.pack("<Q", len(text.encode())) + text.encode() + values)
    return digest.hexdigest()


def in_brackets(sizes):
    return "(" + ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "") + ")"


def numbers(raw, dtype, shape):
    if dtype == "BF16":
        bits = numpy.frombuffer(raw, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype("f8").reshape(shape)
    code = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return numpy.frombuffer(raw, code).astype("f8").reshape(shape)


# --- header --------------------------------------------------------------------------------------


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value):
    return is_integer(value) or isinstance(value, float)


def is_size(value):
    return is_integer(value) and 1 <= value < 2**31


def is_positive(value):
    return is_integer(value) and value >= 1


def is_text(value):
    return isinstance(value, str)


def is_scale(value):
    return is_number(value) and -LARGEST <= value <= LARGEST


def are_ranges(value):
    if not isinstance(value, list) or not value:
        return False
    for one in value:
        if not (isinstance(one, list) and len(one) == 2 and all(map(is_integer, one))):
            return False
    ends = [0, *(end for one in sorted(value) for end in one)]
    return all(first < stop for first, stop in value) and ends == sorted(ends)


def are_rows(value):
    return value == [] or (are_ranges(value) and value == sorted(value) and value[-1][1] < 2**31)


def is_list_of_text(value):
    return isinstance(value, list) and all(map(is_text, value))


def one_of(*allowed):
    return lambda value: any(value is one or (is_text(value) and value == one) for one in allowed)


def optional(check):
    return lambda value: value is None or check(value)


def is_object_of(check):
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


CONFIG = {
    "r": (REQUIRED, is_positive),
    "target": ("all-linear", optional(is_text)),
    "method": ("bone", lambda value: is_text(value) and value in METHODS),
    "r_out": (None, optional(is_positive)),
    "exclude": ([], is_list_of_text),
    "rank_pattern": ({}, is_object_of(is_positive)),
    "layouts": ({}, is_object_of(one_of(*LAYOUTS))),
    "rows": ({}, is_object_of(are_ranges)),
    "dropout": (0, lambda value: is_number(value) and 0 <= value < 1),
    "scale": (1, is_scale),
    "dtype": (None, one_of("float16", "bfloat16", "float32", "float64", None)),
    "init": ("zeros", one_of("zeros", "kaiming")),
    "also_train": ([], is_list_of_text),
}

LAYER = {
    "name": (REQUIRED, is_text),
    "layout": (REQUIRED, one_of(*LAYOUTS)),
    "r": (REQUIRED, is_size),
    "in": (REQUIRED, is_size),
    "out": (REQUIRED, is_size),
    "scale": (REQUIRED, is_scale),
    "groups": (1, is_size),
    "padding_idx": (None, lambda value: value is None or (is_integer(value) and value >= 0)),
    "rows": ([], are_rows),
    "base": (None, optional(is_text)),
}

HEADER = {
    "format": (REQUIRED, lambda value: is_integer(value) and value == 1),
    "config": (REQUIRED, lambda value: isinstance(value, dict)),
    "layers": (REQUIRED, lambda value: isinstance(value, list) and 1 <= len(value) <= 100_000),
    "also_train": (REQUIRED, is_list_of_text),
    "metadata": (REQUIRED, is_object_of(is_text)),
}


def fields_of(found, table):
    need(isinstance(found, dict), "no object")
    fields = {}
    for name, (default, check) in table.items():
        need(name in found or default is not REQUIRED, f"{name} is missing")
        fields[name] = found.get(name, default)
        need(check(fields[name]), f"{name} is {fields[name]!r}")
    return fields


def read(data):
    """Return the adapter in a file, given as bytes."""
    text, dtypes, raw = container(data)
    header = fields_of(parsed(text), HEADER)
    need(set(header["config"]) <= set(CONFIG), "the configuration has an unknown field")
    config = fields_of(header["config"], CONFIG)
    need(config["method"] == "bone" or config["r_out"] is None, "a BAT tile")
    layers = []
    for found in header["layers"]:
        fields = fields_of(found, LAYER)
        check_layer(found, fields)
        layers.append(Layer(config["method"], config["r_out"], *fields.values()))
    keys = [layer.key for layer in layers] + header["also_train"]
    need(len(set(keys)) == len(keys), "a key twice")
    need(set(keys) == set(raw), "keys and tensors disagree")
    tensors = {key: numbers(part, dtypes[key], shape) for key, (part, shape) in raw.items()}
    for layer in layers:
        check_shape(layer, tensors[layer.key].shape)
    need(all(numpy.isfinite(tensor).all() for tensor in tensors.values()), "not finite")
    return Adapter(text, layers, header["also_train"], header["metadata"], dtypes, tensors)


def check_layer(found, fields):
    need(all(value is not None for name, value in found.items() if name in LAYER), "null")
    for name, only in (("groups", "in out *kernel"), ("padding_idx", "index out")):
        need(name not in found or fields["layout"] == only, f"{name} for another layout")
    need("rows" not in found or found["rows"], "empty rows")
    need((fields["padding_idx"] or 0) < fields["in"], "padding_idx beyond the inputs")
    count = sum(stop - first for first, stop in fields["rows"])
    need(not count or count == fields["out"], "rows and out disagree")


def check_shape(layer, shape):
    r, outputs = layer.r, layer.r_out or layer.outputs
    need(r <= layer.inputs, "r is larger than in")
    need(layer.outputs % outputs == 0, "r_out does not divide out")
    need(all(shape), "an empty block")
    sizes = METHODS[layer.method].sizes(layer)
    axes = len(sizes)
    if layer.layout == "out in *kernel" and axes == 2:
        need(shape[:2] == sizes[::-1] and len(shape) >= 3, "shape")
    elif layer.layout == "in out *kernel" and axes == 2:
        need(shape[:2] == (layer.groups * sizes[0], sizes[1]) and len(shape) >= 3, "shape")
    elif layer.layout == "out in *kernel":
        need(shape[-axes:] == sizes and len(shape) > axes, "shape")
    elif layer.layout == "in out *kernel":
        need(
            shape[-axes:] == sizes and shape[0] == layer.groups and len(shape) >= axes + 2, "shape"
        )
    elif "expert" in layer.layout:
        need(shape[1:] == sizes, "shape")
    else:
        need(shape == sizes, "shape")


# --- weights -------------------------------------------------------------------------------------


def matrices(layer, weight):
    """Return the matrices (out, in) that a weight is made of, by their place in the stack.

    They are views: writing into them changes the weight.
    """
    layout = layer.layout
    if layout == "out in":
        return {(): weight}
    if layout in ("in out", "index out"):
        return {(): weight.T}
    if layout == "expert out in":
        return {(e,): weight[e] for e in range(len(weight))}
    if layout == "expert in out":
        return {(e,): weight[e].T for e in range(len(weight))}
    found = {}
    for position in numpy.ndindex(weight.shape[2:]):
        at = weight[(slice(None), slice(None), *position)]
        if layout == "out in *kernel":
            found[position] = at
            continue
        size = len(weight) // layer.groups
        for group in range(layer.groups):
            found[(group, *position)] = at[group * size : (group + 1) * size].T
    return found


def blocks(layer, block, places):
    """Return the block of one matrix for each place in the stack."""
    if len(METHODS[layer.method].sizes(layer)) == 2 and "*kernel" in layer.layout:
        return {place: matrix.T for place, matrix in matrices(layer, block).items()}
    return {place: block[place] for place in places}


def rows_of(layer):
    return [row for first, stop in layer.rows for row in range(first, stop)]


def add_update(layer, weight, base, block):
    """Add s dW to a weight, one element after the other; dW comes from the base weight."""
    own, before = matrices(layer, weight), matrices(layer, base)
    for place, part in blocks(layer, block, own).items():
        rows = rows_of(layer) or list(range(layer.outputs))
        delta = METHODS[layer.method].update(layer, before[place][rows], part)
        if layer.padding_idx is not None:
            delta[:, layer.padding_idx] = 0
        own[place][rows] += layer.scale * delta


def bone_sizes(layer):
    return layer.r, layer.r_out or layer.outputs


def bone_update(layer, weight, block):
    result = numpy.zeros(weight.shape)
    for o in range(layer.outputs):
        for i in range(layer.inputs):
            result[o, i] = block[i % layer.r, o % block.shape[1]]
    return result


def bat_sizes(layer):
    return -(-layer.outputs // layer.r), layer.r, layer.r


def bat_update(layer, weight, block):
    r, result = layer.r, numpy.zeros(weight.shape)
    for o in range(layer.outputs):
        for i in range(layer.inputs):
            result[o, i] = block[o // r, o % r, i % r]
            for k in range(r):
                column = k + r * (i // r)
                if column < layer.inputs:
                    result[o, i] += weight[o, column] * block[o // r, k, i % r]
    return result


class Method(NamedTuple):
    """The sizes of the block of one matrix, and the update of one matrix (out, in)."""

    sizes: Callable
    update: Callable


METHODS = {"bone": Method(bone_sizes, bone_update), "bat": Method(bat_sizes, bat_update)}


def place(layer, parameters):
    """Return the name of the parameter that holds a layer's weight."""
    owner, _, part = layer.name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    names = [f"{layer.name}.weight" if layer.name else "weight", layer.name]
    if part in ("q_proj", "k_proj", "v_proj"):
        names.append(f"{prefix}in_proj_weight" if layer.rows else f"{prefix}{part}_weight")
    return next(name for name in names if name in parameters)


def adapted_part(layer, weight):
    """Return the rows of a weight that are adapted, laid out as the weight is."""
    if not layer.rows:
        return weight
    return numpy.take(weight, rows_of(layer), axis=layer.layout.split().index("out"))


def merged(adapter, parameters):
    """Return parameters (name -> array) with the adapter in them, in double precision."""
    result = {name: numpy.array(value, "f8") for name, value in parameters.items()}
    for name in adapter.also_train:
        result[name] = adapter.tensors[name].copy()
    base = {name: value.copy() for name, value in result.items()}
    for layer in adapter.layers:
        name = place(layer, parameters)
        add_update(layer, result[name], base[name], adapter.tensors[layer.key])
    return result


# --- fingerprint ---------------------------------------------------------------------------------


def to_bfloat16(values):
    """Return the bits of singles as bfloat16: to the nearest, ties to even."""
    bits = values.astype("<f4").view("<u4").astype("u8")
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) >> 16).astype("<u2")


def fingerprint(weight):
    """Return the fingerprint of an array."""
    values, count = weight.reshape(-1), min(64, weight.size)
    places = [k * (weight.size - 1) // max(count - 1, 1) for k in range(count)]
    with numpy.errstate(over="ignore"):
        single = numpy.array([values[place] for place in places]).astype("<f4")
        half = single.astype("<f2").astype("<f4")
    digests = [
        hashlib.sha256(
            in_brackets(weight.shape).encode() + to_bfloat16(form).tobytes()
        ).hexdigest()[:8]
        for form in (single, half)
    ]
    return "".join(digests)


def same_base(first, second):
    return bool({first[:8], first[8:]} & {second[:8], second[8:]})
