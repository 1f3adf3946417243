"""The updates of an adapter as products of two low-rank factors: dW = s B A.

Bone and tile are exactly that, with A = [I_r I_r ... I_r] cropped to the input and B = D^T. So are
their embeddings, by rows of the table, and their convolutions, whose A holds one input channel
shard and one position of the kernel in each row. Where a method has no factors (BAT), dW is cut to
the rank asked for, by its singular values, and so is Bone where a smaller rank is asked for.

Source: Hu et al., "LoRA", arXiv 2106.09685; Eckart and Young, 1936, for the cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from disha import functional
from disha.errors import (
    AdapterFileError,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    ConversionError,
)
from disha.files import AdapterHeader, LayerRecord
from disha.functional import Layout
from disha.state import finite_as
from disha.tables import table
from disha.text import printable

__all__ = [
    "BaseWeight",
    "LoraLayer",
    "LoraReport",
    "LowRankUpdate",
    "Progress",
    "block_of_factors",
    "check_limits",
    "commonest",
    "few",
    "low_rank_updates",
]

T = TypeVar("T", int, tuple[int, float])

BaseWeight = Callable[[str], Tensor]
"""Name of a weight -> its base weight, laid out as the model has it."""

Progress = Callable[[Sequence[LayerRecord]], Iterable[LayerRecord]]
"""Passes layers on, one by one, as tqdm does."""

PEFT_PATTERNS = ("out in", "in out", "out in *kernel", "index out")
"""The layouts of the modules that PEFT's LoRA has layers for."""

LARGEST_FACTORS, FACTORS_PER_VALUE = 2**27, 64
"""Values of all A together: this many, and more for each value that the blocks have."""

LARGEST_EXACT = 2048
"""Up to this size, all singular values are computed; beyond it the leading ones only."""


@dataclass(frozen=True)
class LowRankUpdate:
    """One layer's update as LoRA has it: dW = s B A.

    Attributes:
        record: the layer.
        a: A (rank, in); of a convolution (rank, in, *kernel), of an embedding (rank, rows).
        b: B (out, rank).
        norm: Frobenius norm of s dW.
        lost: Frobenius norm of s (dW - B A).
    """

    record: LayerRecord
    a: Tensor
    b: Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraLayer:
    """A layer that was written as LoRA.

    Attributes:
        name: its name in the model.
        method: the method of its block.
        r: shard size of its block.
        rank: rank of its factors.
        error: ||dW - B A|| / ||dW||, both Frobenius norms.
    """

    name: str
    method: str
    r: int
    rank: int
    error: float


@dataclass(frozen=True)
class LoraReport:
    """What was written as LoRA; printable.

    Attributes:
        path: the folder or file.
        layers: every layer, with its relative error.
        error: the relative error of all updates together.
        also_train: names of the tensors written beside the factors.
    """

    path: Path
    layers: tuple[LoraLayer, ...]
    error: float
    also_train: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, path: Path, updates: Sequence[LowRankUpdate], also_train: Iterable[str] = ()
    ) -> LoraReport:
        """Return the report on updates that are written to `path`."""
        layers = tuple(
            LoraLayer(
                update.record.name,
                update.record.method,
                update.record.r,
                update.rank,
                _ratio(update.lost, update.norm),
            )
            for update in updates
        )
        return cls(path, layers, _total_error(updates), tuple(also_train))

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.method, layer.r, layer.rank, _shown(layer.error))
            for layer in self.layers
        ]
        lines = [table(("layer", "method", "r", "rank", "error"), rows)]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        path = printable(str(self.path))
        lines.append(f"{path}: {len(self.layers)} layers, total error {_shown(self.error)}")
        return "\n".join(lines)


def _shown(error: float) -> str:
    return "exact" if error == 0 else f"{error:.3g}"


def _ratio(lost: float, norm: float) -> float:
    return lost / norm if lost and norm else 0.0


def _total_error(updates: Sequence[LowRankUpdate]) -> float:
    lost = math.hypot(*(update.lost for update in updates))
    return _ratio(lost, math.hypot(*(update.norm for update in updates)))


# --- from blocks to factors ----------------------------------------------------------------------


def check_limits(rank: object, max_error: object) -> None:
    """Raise unless both are None or usable."""
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ArgumentTypeError(
                f"rank must be an int of at least 1, got {rank!r} of type {type(rank).__name__}"
            )
        if rank < 1:
            raise ArgumentError(f"rank must be at least 1, got {rank}")
    if max_error is not None:
        if isinstance(max_error, bool) or not isinstance(max_error, (int, float)):
            raise ArgumentTypeError(
                f"max_error must be a number, got {max_error!r} of type {type(max_error).__name__}"
            )
        if not max_error >= 0:
            raise ArgumentError(f"max_error must be at least 0, got {max_error}")


def low_rank_updates(
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    base: BaseWeight | None = None,
    progress: Progress = iter,
) -> tuple[LowRankUpdate, ...]:
    """Return the factors of every layer's update, in the dtype of its block.

    Args:
        header: what describes the adapter.
        tensors: its tensors.
        rank: largest rank of a layer; None for the exact factors, which BAT does not have.
        max_error: largest relative error that a layer may have.
        base: gives the base weights; needed for BAT only.
        progress: passes the layers on while they are converted.

    Raises:
        ConversionError: a layer has no low-rank factors, or would lose more than `max_error`.
        ArgumentError: `rank` or `max_error` is out of range, or BAT lacks `rank` or `base`.
        ArgumentTypeError: one of them is no number.
        AdapterFileError: a block's shape is not its layer's, or layers are described as so large
            that the factors would fill the memory.
        AdapterStateError: an update is not finite, or its factors in the block's dtype.
    """
    check_limits(rank, max_error)
    _check_convertible(header)
    for layer in header.layers:
        misfit = layer.block_misfit(tuple(tensors[layer.key].shape))
        if misfit is not None:
            raise AdapterFileError(f"{layer.name}: {misfit}")
    _check_memory(header, tensors)
    updates = [_update(one, tensors[one.key], rank, base) for one in progress(header.layers)]
    _check_finite(updates)
    _check_error(updates, max_error)
    return tuple(updates)


def _check_convertible(header: AdapterHeader) -> None:
    without = [
        layer.name
        for layer in header.layers
        if layer.layout.pattern not in PEFT_PATTERNS or layer.rows
    ]
    if without:
        raise ConversionError(
            f"LoRA has no form for {len(without)} of {len(header.layers)} layers "
            f"({few(without)}): it knows whole linear layers, convolutions that are not "
            "transposed, and embeddings; leave these out of the adapter (exclude=)"
        )


def commonest(values: Iterable[T]) -> T:
    """Return the value that occurs most often; the largest of several, whatever their order."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def few(names: Sequence[str]) -> str:
    """Return the first of some names, for a message."""
    return ", ".join(name or "(the model)" for name in names[:5]) + (", ..." * (len(names) > 5))


def _check_memory(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise if small blocks would become huge factors: a file may say any size of an input."""
    sizes = {}
    for layer in header.layers:
        positions = math.prod(layer.geometry(tuple(tensors[layer.key].shape)).stack)
        sizes[layer.name] = layer.r * layer.in_features * positions**2
    values = sum(tensors[layer.key].numel() for layer in header.layers)
    if sum(sizes.values()) > LARGEST_FACTORS + FACTORS_PER_VALUE * values:
        worst = max(sizes, key=sizes.__getitem__)
        raise AdapterFileError(
            f"the factors A would have {sum(sizes.values()):,} values, {sizes[worst]:,} of them in "
            f"{worst}, for blocks of {values:,}: the sizes of the layers can't be right"
        )


def _update(
    layer: LayerRecord, block: Tensor, rank: int | None, base: BaseWeight | None
) -> LowRankUpdate:
    factors = _factors(layer, block)
    if factors is None:
        return _cut_update(layer, block, rank, base)
    a, b = factors
    norm = abs(layer.scale) * _product_norm(b, a.flatten(1))
    if rank is None or rank >= a.shape[0]:
        return LowRankUpdate(layer, a, b, norm, 0.0)
    cut_a, cut_b = (x.to(block.dtype) for x in _cut_product(layer, b, a.flatten(1), rank))
    both_b, both_a = torch.cat([b, -cut_b], dim=1), torch.cat([a.flatten(1), cut_a])
    lost = abs(layer.scale) * _difference_norm(both_b, both_a)
    return LowRankUpdate(layer, cut_a.reshape(-1, *a.shape[1:]), cut_b, norm, lost)


def _factors(layer: LayerRecord, block: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return A (rank, in, *kernel) and B (out, rank), or None where dW has no low rank.

    Row (j, k) of a convolution's A is row j of the A of position k of the kernel, and zero at the
    other positions.
    """
    geometry = layer.geometry(tuple(block.shape))
    factors = functional.lora_factors(layer.method, layer.layout, block, geometry)
    if factors is None:
        return None
    a, b = factors
    if layer.layout.padding_idx is not None:
        a[..., layer.layout.padding_idx] = 0
    if not layer.layout.has_kernel:
        return a, b
    kernel = geometry.stack
    a, b = a.flatten(0, len(kernel) - 1), b.flatten(0, len(kernel) - 1)
    each_alone = torch.diag_embed(a.permute(1, 2, 0)).transpose(1, 2)  # (r, k, in, k)
    a = each_alone.reshape(-1, layer.in_features, *kernel)
    return a.contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def _cut_update(
    layer: LayerRecord, block: Tensor, rank: int | None, base: BaseWeight | None
) -> LowRankUpdate:
    """Return the leading singular values of dW, which is formed."""
    method, layout = functional.method_of(layer.method), layer.layout
    if rank is None:
        raise ArgumentError(
            f"a {method.name} update is not low-rank, so writing it as LoRA cuts it to a rank: "
            "pass rank=, and max_error= to refuse losing more than that"
        )
    weight = block.new_empty(()).expand(layer.weight_shape(tuple(block.shape)))  # for its shape
    if method.reads_weight:
        weight = _base_weight(layer, block, base)
    delta = functional.delta_weight(layer.method, layout, block, weight)
    delta = _in_order(layout, delta)
    a, b = (x.to(block.dtype).contiguous() for x in _cut(layer, delta.flatten(1), rank))
    rest = delta.flatten(1) - b.to(delta.dtype) @ a.to(delta.dtype)
    scale = abs(layer.scale)
    a = a.reshape(-1, *delta.shape[1:])
    return LowRankUpdate(layer, a, b, scale * _norm(delta), scale * _norm(rest))


def _in_order(layout: Layout, delta: Tensor) -> Tensor:
    """Return dW as (out, in, *kernel)."""
    return delta.transpose(0, 1) if layout.in_first else delta


def _base_weight(layer: LayerRecord, block: Tensor, base: BaseWeight | None) -> Tensor:
    if base is None:
        raise ArgumentError(
            f"a {layer.method} update depends on the base weights, which the adapter does not "
            "hold: pass what gives them (base=), or export from the model"
        )
    weight = base(layer.name).detach().cpu()
    misfit = layer.weight_misfit(tuple(block.shape), tuple(weight.shape))
    if misfit is not None:
        raise AdapterFileError(f"{layer.name}: {misfit}; give the base that it was trained on")
    return weight


def _check_finite(updates: Sequence[LowRankUpdate]) -> None:
    broken = [
        update.record.name
        for update in updates
        if not all(finite_as(factor, factor.dtype) for factor in (update.a, update.b))
    ]
    if broken:
        raise AdapterStateError(
            f"the factors of {few(broken)} are not finite in the dtype of their blocks; nothing "
            "was written. Convert an adapter with wider blocks (load_adapter(..., dtype=))"
        )


def _check_error(updates: Sequence[LowRankUpdate], max_error: float | None) -> None:
    if max_error is None:
        return
    errors = {update.record.name: _ratio(update.lost, update.norm) for update in updates}
    # An error that is not a number is none that is small enough.
    beyond = [name for name in errors if not errors[name] <= max_error]
    beyond.sort(key=lambda name: (math.isnan(errors[name]), errors[name]))
    if beyond:
        worst = ", ".join(f"{name}: {errors[name]:.3g}" for name in reversed(beyond[-5:]))
        raise ConversionError(
            f"{len(beyond)} of {len(updates)} layers would lose more than max_error={max_error:g} "
            f"of their update ({worst}{', ...' if len(beyond) > 5 else ''}; all layers together "
            f"{_total_error(updates):.3g}); nothing was written. Pass a larger rank or max_error"
        )


# --- linear algebra ------------------------------------------------------------------------------


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Return ||B A|| without forming the product: its square is the sum of (B^T B) * (A A^T)."""
    b, a = b.double(), a.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _difference_norm(b: Tensor, a: Tensor) -> float:
    """Return ||B A|| where terms cancel: by triangles, as squares would lose half the digits."""
    return _norm(_triangle(b) @ _triangle(a.T).T)


def _triangle(x: Tensor) -> Tensor:
    r: Tensor = torch.linalg.qr(x.double(), mode="r")[1]
    return r


def _cut_product(layer: LayerRecord, b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best A' (rank, in) and B' (out, rank) for B A, of which only cores are formed."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    cut_a, cut_b = _cut(layer, r_b @ r_a.T, rank)
    return (cut_a @ q_a.T).contiguous(), (q_b @ cut_b).contiguous()


def _cut(layer: LayerRecord, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of the leading singular values, shared evenly."""
    if not finite_as(matrix, matrix.dtype):
        raise AdapterStateError(
            f"the update of {layer.name} is not finite: its block, or the base weight, holds NaN, "
            "infinity or values that are too large; nothing was written. Go back to an earlier "
            "state of the training, or take another copy of the base"
        )
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    if smaller <= LARGEST_EXACT or 4 * rank >= smaller:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file every time
            u, s, v = torch.svd_lowrank(matrix, q=2 * rank, niter=4)
            vh = v.mT
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


# --- from factors to blocks ----------------------------------------------------------------------


def block_of_factors(layer: LayerRecord, a: Tensor, b: Tensor) -> Tensor | None:
    """Return the Bone block D whose factors these are, or None where A is not that of a block.

    Args:
        layer: what the block would be of.
        a: A (r, in); of a convolution (r * positions, in, *kernel).
        b: B (out, r); of a convolution (out, r * positions, 1, ...).
    """
    kernel = tuple(a.shape[2:])
    fits = a.dim() == b.dim() >= 2 and a.shape[0] == b.shape[1] and b.shape[2:].numel() == 1
    if not fits or not a.numel():
        return None
    if kernel and a.shape[0] == layer.r * math.prod(kernel):
        block = b.reshape(b.shape[0], layer.r, *kernel).contiguous()
    else:
        block = b.T.contiguous()
    if layer.block_misfit(tuple(block.shape)) is not None:
        return None
    factors = _factors(layer, block.to(a.dtype))
    return block if factors is not None and torch.equal(factors[0], a) else None
