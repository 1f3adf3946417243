"""A reader of adapter files, written from docs/reference/format.md alone: slow, and all by hand.

It uses neither disha nor safetensors nor torch, so that what it finds in a file, and what it makes
of it, is there by the format and not by the library. `read` takes a file apart; `merged` gives the
weights of a model with the adapter in them.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy


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
    kernel: list

    @property
    def key(self):
        kind = "bone" if self.method.startswith("bone_groups") else self.method
        return f"{self.name}.{kind}_block" if self.name else f"{kind}_block"


@dataclass
class Adapter:
    layers: list
    also_train: list
    metadata: dict
    tensors: dict


# --- container -----------------------------------------------------------------------------------


def container(data):
    """Return the text of the header, and the tensors by key."""
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length].decode())
    metadata = entries.pop("__metadata__")
    values, tensors = data[8 + length :], {}
    for key, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[key] = numbers(values[begin:end], entry["dtype"], entry["shape"])
    return metadata["disha"], tensors


def numbers(raw, dtype, shape):
    if dtype == "BF16":
        bits = numpy.frombuffer(raw, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype("f8").reshape(shape)
    if dtype == "BOOL":
        return numpy.frombuffer(raw, "?").reshape(shape)
    if dtype == "C64":  # two singles for each number: the real part, then the imaginary
        return numpy.frombuffer(raw, "<c8").astype("c16").reshape(shape)
    code = f"<{dtype[0].lower()}{int(dtype[1:]) // 8}"  # such as <f4 for F32, and <u1 for U8
    values = numpy.frombuffer(raw, code).reshape(shape)
    return values.astype("f8") if dtype[0] == "F" else values


def read(data):
    """Return the adapter in a file, given as bytes."""
    text, tensors = container(data)
    header = json.loads(text)
    assert header["format"] == 1
    assert not header.get("needs")
    method, r_out = header["config"].get("method", "bone"), header["config"].get("r_out")
    layers = [
        Layer(
            method, r_out, one["name"], one["layout"], one["r"], one["in"], one["out"],
            one.get("scale", 1), one.get("groups", 1), one.get("padding_idx"), one.get("rows", []),
            one.get("base"), one.get("kernel", []),
        )
        for one in header["layers"]
    ]  # fmt: skip
    also_train = header.get("also_train", [])
    assert sorted([layer.key for layer in layers] + also_train) == sorted(tensors)
    return Adapter(layers, also_train, header.get("metadata", {}), tensors)


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
    if layout not in ("out in *kernel", "in out *kernel"):
        raise NotImplementedError(f"add the matrices of {layout!r} here")
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
    if layer.method == "lora" and "*kernel" in layer.layout:
        return dict(lora_of_kernel(layer, block, places))
    if len(METHODS[layer.method].sizes(layer)) == 2 and "*kernel" in layer.layout:
        return {place: matrix.T for place, matrix in matrices(layer, block).items()}
    return {place: block[place] for place in places}


def lora_of_kernel(layer, block, places):
    """Yield A of each position of a kernel, which varies fastest in its rows, beside B."""
    axes = len(layer.kernel)
    numbers = numpy.arange(layer.inputs * math.prod(layer.kernel))
    numbers = numbers.reshape(layer.inputs, *layer.kernel)
    for place in places:
        own = block[place[:-axes]]
        a = own[:, numbers[(slice(None), *place[-axes:])]]
        yield place, numpy.concatenate([a, own[:, numbers.size :]], 1)


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
    result = numpy.zeros(weight.shape, block.dtype)
    for o in range(layer.outputs):
        for i in range(layer.inputs):
            result[o, i] = block[i % layer.r, o % block.shape[1]]
    return result


def groups_update(layer, weight, block, groups):
    outputs, inputs = weight.shape
    groups = min(groups, -(-inputs // layer.r), outputs)
    result = numpy.zeros(weight.shape, block.dtype)
    for o in range(outputs):
        for i in range(inputs):
            if (i // layer.r) % groups == o % groups:
                result[o, i] = block[i % layer.r, o]
    return result


def lora_sizes(layer):
    return layer.r, layer.inputs + layer.outputs


def lora_update(layer, weight, block):
    """A and B^T lie beside each other, so dW[o, i] is the sum over k of B[o, k] A[k, i]."""
    result = numpy.zeros(weight.shape, block.dtype)
    for o in range(layer.outputs):
        for i in range(layer.inputs):
            for k in range(layer.r):
                result[o, i] += block[k, layer.inputs + o] * block[k, i]
    return result


def bat_sizes(layer):
    return -(-layer.outputs // layer.r), layer.r, layer.r


def bat_update(layer, weight, block):
    r, result = layer.r, numpy.zeros(weight.shape, block.dtype)
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


METHODS = {
    "bone": Method(bone_sizes, bone_update),
    "bone_groups2": Method(bone_sizes, partial(groups_update, groups=2)),
    "bone_groups_all": Method(bone_sizes, partial(groups_update, groups=math.inf)),
    "bat": Method(bat_sizes, bat_update),
    "lora": Method(lora_sizes, lora_update),
}


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
    result = {}
    for name, value in parameters.items():
        result[name] = numpy.array(value, "c16" if numpy.iscomplexobj(value) else "f8")
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
    chosen = numpy.array([values[place] for place in places])
    if numpy.iscomplexobj(chosen):
        chosen = numpy.array([part for value in chosen for part in (value.real, value.imag)])
    with numpy.errstate(over="ignore"):
        single = chosen.astype("<f4")
        half = single.astype("<f2").astype("<f4")
    digests = [
        hashlib.sha256(str(tuple(weight.shape)).encode() + to_bfloat16(form).tobytes()).hexdigest()[
            :8
        ]
        for form in (single, half)
    ]
    return "".join(digests)


def same_base(first, second):
    return bool({first[:8], first[8:]} & {second[:8], second[8:]})
