"""Updates as products of two low-rank factors, as in LoRA: dW = B A.

Bone and tile are exactly such products: A = [I_r I_r ... I_r], cropped to the input, and B = D^T.
A row of a convolution's A holds one channel shard at one position of the kernel. BAT, and updates
of a larger rank than wanted, are truncated to their largest singular values.

Source: Hu et al., "LoRA", arXiv 2106.09685; Eckart and Young, 1936, for the truncation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import multimode
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disha.checks import check_positive_int
from disha.config import AdapterConfig
from disha.errors import AdapterFileError, ArgumentError, ConversionError
from disha.files import AdapterContents
from disha.files.contents import LayerBlock, Source, contents_of_blocks
from disha.functional import METHODS, Layout, Method, method_of
from disha.functional.layouts import place_outputs
from disha.functional.method import ALL_GROUPS, Groups
from disha.layers.spec import BlockSpec
from disha.layers.weights import base_of
from disha.model.state import Tensors
from disha.model.view import ModelView
from disha.sharding.tensors import gather
from disha.text import counted, first_few, printable, table

BaseWeight = Callable[[str], Tensor]
"""Takes the name of a layer, returns its base weight as the model stores it."""

CONV = "out in *kernel"

LORA_LAYOUTS = ("out in", "in out", CONV, "index out")
"""The layouts of the weights that LoRA can adapt, besides stacks of experts."""

_STACK = re.compile(r"(?:.+\.)?experts\.(?:gate_up_proj|down_proj)")
"""The names of stacks of experts that LoRA formats have a place for."""

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for its largest rank, --max-lora-rank."""

LARGEST_EXACT = 2048
"""Matrices up to this size get all their singular values, larger ones only the leading ones."""


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
class LowRankUpdate:
    """The update of one layer as in LoRA, s dW = s B A; the error is ||dW - B A|| / ||dW||.

    The shapes of A and B, by the layout of the weight:

        out in, in out    (rank, in)              (out, rank)
        out in *kernel    (rank, in, *kernel)     (out, rank)
        index out         (rank, index)           (out, rank)
        a stack           (expert, rank, in)      (expert, out, rank)
    """

    record: BlockSpec
    a: Tensor
    b: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.b.shape[-1]

    def described(self) -> LoraLayer:
        """Return what a report says of it."""
        layer = self.record
        return LoraLayer(layer.name, layer.method, layer.r, self.rank, self.error)

    def padded(self, rank: int) -> LowRankUpdate:
        """Return the same update with a larger rank, by zeros in A and B."""
        filled = ((0, self.rank),)
        rank_axis = self.b.dim() - 2  # of A: 1 for a stack, otherwise 0
        a = place_outputs(self.a, filled, rank, dim=rank_axis)
        b = place_outputs(self.b, filled, rank, dim=-1)
        return dataclasses.replace(self, a=a, b=b)


@dataclass(frozen=True)
class LoraReport:
    """The layers that were written as LoRA or for PEFT's MiSS, with their errors; printable.

    Attributes:
        path: the folder or file.
        layers: every layer, with its relative error.
        also_train: names of the tensors written besides the factors.
    """

    path: Path
    layers: tuple[LoraLayer, ...]
    also_train: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest relative error of a layer."""
        return max((layer.error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.method, layer.r, layer.rank, _describe_error(layer.error))
            for layer in self.layers
        ]
        lines = [table(("layer", "method", "r", "rank", "error"), rows)]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        count = counted(len(self.layers), "layer")
        error = _describe_error(self.error)
        lines.append(f"{printable(str(self.path))}: {count}, largest error {error}")
        return "\n".join(lines)


def _describe_error(error: float) -> str:
    """Return the relative error of an update, for a message."""
    return "exact" if error == 0 else f"{error:.3g}"


def list_names(names: Sequence[str]) -> str:
    """Return the first names of a list as a text for a message."""
    shown = [name or "(the model)" for name in names]
    return first_few(shown, 5, ", ")


def base_weights_of_model(view: ModelView, adapter: str) -> BaseWeight:
    """Return a function from a layer's name to its base weight in a model; collective if sharded.

    The layers are those of the adapter.
    """
    places = {
        model_block.name: (model_block.layer, model_block.block.spec)
        for model_block in view.require(adapter)
    }
    return lambda name: gather(base_of(*places[name]).detach())


# --- from blocks to factors ----------------------------------------------------------------------


def low_rank_updates(
    layers: Sequence[BlockSpec],
    tensors: Tensors,
    *,
    rank: int | None,
    pad: bool = False,
    base: BaseWeight | None,
) -> list[LowRankUpdate]:
    """Return the updates of layers; `disha.interop.lora.export` documents the arguments."""
    check_rank(rank)
    inexpressible = [record.name for record in layers if not _is_expressible(record)]
    if inexpressible:
        raise ConversionError(
            f"LoRA can't express {len(inexpressible)} of {counted(len(layers), 'layer')} "
            f"({list_names(inexpressible)}); leave them out of the adapter (`exclude`)"
        )
    updates = []
    for record in layers:
        update = _update_of(record, tensors[record.key], rank, base)
        if record.outputs:
            if base is None:
                raise ArgumentError(
                    f"{record.name} adapts some outputs of its weight only, and LoRA needs to know "
                    "how many there are: give `base` (--base)"
                )
            geometry = record.layout.geometry(base(record.name).shape)
            b = place_outputs(update.b, record.outputs, geometry.out_features)  # zero in other rows
            update = dataclasses.replace(update, b=b)
        updates.append(update)
    if not (pad and updates):
        return updates
    padded_rank = find_served_rank(max(update.rank for update in updates))
    return [update.padded(padded_rank) for update in updates]


def find_served_rank(rank: int) -> int:
    """Return the smallest rank that vLLM can be started with for a LoRA.

    Above all of them it is the LoRA's own, and vLLM names those that it takes.
    """
    for served in SERVED_RANKS:
        if served >= rank:
            return served
    return rank


def _is_expressible(layer: BlockSpec) -> bool:
    """Whether a LoRA can hold the update of a layer."""
    if layer.tied or layer.is_new_rows:
        return False
    return is_stack(layer) or layer.layout.pattern in LORA_LAYOUTS


def check_rank(rank: int | None) -> None:
    """Raise unless a rank is None or positive."""
    if rank is not None:
        check_positive_int("rank", rank)


def is_stack(layer: BlockSpec) -> bool:
    """Whether a layer is a stack of experts that LoRA formats have a place for."""
    return layer.layout.experts_first and _STACK.fullmatch(layer.name) is not None


def _update_of(
    layer: BlockSpec, block: Tensor, rank: int | None, base: BaseWeight | None
) -> LowRankUpdate:
    """Return the factors of a block, or those of the leading singular values of dW."""
    factors = _factors(layer, block)
    if factors is not None and (rank is None or rank >= factors[1].shape[-1]):
        return LowRankUpdate(layer, *factors)
    if is_stack(layer):
        raise ConversionError(
            f"{layer.name} is a stack of experts, and a {layer.method} update of a stack can't be "
            "cut to a rank; merge it"
        )
    if rank is None:
        raise ArgumentError(f"a {layer.method} update is cut to a rank: give `rank` (--rank)")
    delta = _delta(layer, block, base)  # (out, in, *kernel)
    matrix = delta.flatten(1)  # (out, in * kernel)
    matrix = matrix.to(torch.promote_types(delta.dtype, torch.float32))
    wide_a, wide_b = _truncate(matrix, rank)
    a = wide_a.to(block.dtype)
    b = wide_b.to(block.dtype)
    lost = matrix - b.to(matrix.dtype) @ a.to(matrix.dtype)
    norm = matrix.norm().item()
    error = 0.0
    if norm and layer.scale:
        error = lost.norm().item() / norm
    return LowRankUpdate(layer, a.reshape(-1, *delta.shape[1:]), b, error)


def _factors(layer: BlockSpec, block: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return A and B as `LowRankUpdate` has them, or None if the method has no factors."""
    geometry = layer.geometry
    factors = method_of(layer.method).lora_factors(layer.layout, block, geometry)
    if factors is None:
        return None
    a, b = factors
    if layer.layout.padding_idx is not None:
        a[..., layer.layout.padding_idx] = 0
    if not layer.layout.has_kernel:
        return a, b
    # The stack of a convolution is its kernel: a (*kernel, r, in), b (*kernel, out, r).
    if method_of(layer.method).spans_kernel:
        return a.movedim((-2, -1), (0, 1)), b.reshape(b.shape[-2:])
    kernel = geometry.stack
    a = a.flatten(0, len(kernel) - 1)  # (k, r, in), where k counts the positions of the kernel
    b = b.flatten(0, len(kernel) - 1)  # (k, out, r)
    # A row of the LoRA's A holds a row of `a` at a single position of the kernel, and zeros at all
    # others. So the rank is r * k.
    single_position = torch.diag_embed(a.permute(1, 2, 0)).transpose(1, 2)  # (r, k, in, k)
    lora_a = single_position.reshape(-1, layer.in_features, *kernel)  # (r * k, in, *kernel)
    lora_b = b.permute(1, 2, 0).flatten(1)  # (out, r * k)
    return lora_a, lora_b


def _delta(layer: BlockSpec, block: Tensor, base: BaseWeight | None) -> Tensor:
    """Return dW (out, in, *kernel), or (out, index) of an embedding, whatever the layout."""
    method = method_of(layer.method)
    if not method.reads_weight:
        weight = block.new_empty(()).expand(layer.layout.shape(layer.geometry))  # only its shape
    elif base is None:
        raise ArgumentError(
            f"a {layer.method} update depends on the base weights: give `base` (--base)"
        )
    else:
        weight = layer.layout.part(base(layer.name).cpu(), layer.outputs)
    delta = method.delta_weight(layer.layout, block, weight)
    if layer.layout.in_first:
        return delta.transpose(0, 1)
    return delta


def _truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank), whose product is closest to a matrix (out, in).

    The matrix is U S V^T, of which the largest singular values S are kept. A and B both get the
    root of S, so that their values are of the same size.
    """
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    if smaller <= LARGEST_EXACT or 4 * rank >= smaller:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # Of a larger matrix, the few largest values are found much sooner than all.
        with torch.random.fork_rng(devices=[]):
            # With a fixed seed, every export gives the same file. torch.manual_seed would seed
            # GPUs too.
            torch.default_generator.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=2 * rank, niter=4)
            vh = v.mT
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


# --- from factors to blocks ----------------------------------------------------------------------


class LayerFactors(NamedTuple):
    """The factors of a layer, as a file has them.

    A and B have the shapes of `LowRankUpdate`, but B of a convolution has a kernel of 1: (out,
    rank, 1, 1) in two dimensions.
    """

    name: str
    a: Tensor
    b: Tensor
    layout: Layout
    scale: float


def contents_of_factors(
    source: Source,
    factors: Iterable[LayerFactors],
    dropout: float = 0.0,
    new_rows: Sequence[LayerBlock] = (),
    parameters: Tensors = MappingProxyType({}),
) -> AdapterContents:
    """Return the adapter that has these factors, with new rows and other parameters."""
    blocks = _blocks_of(source, list(factors))
    settings: dict[str, Any] = {"r": 1}  # for new rows alone
    if blocks:
        first, _ = blocks[0]
        usual_r = max(multimode(layer.r for layer, _ in blocks))  # the most frequent
        settings = {"r": usual_r, "method": first.method, "scale": first.scale}
    also_train = tuple(f"^{re.escape(name)}$" for name in parameters)
    config = AdapterConfig(**settings, target=None, dropout=dropout, also_train=also_train)
    return contents_of_blocks(config, [*blocks, *new_rows], parameters)


def _blocks_of(source: Source, factors: Sequence[LayerFactors]) -> list[LayerBlock]:
    """Return the layers and blocks that have these factors, all of one method.

    It is the first that has them all: Bone with groups, whose blocks are the smallest; Bone; LoRA.
    """
    broken = [layer.name for layer in factors if not _fit_together(layer)]
    if not broken:
        for method in _candidates(factors):
            blocks = _blocks_of_method(factors, method)
            if blocks is not None:
                return blocks
    names = broken or [layer.name for layer in factors]
    raise AdapterFileError(
        f"{source} has factors that don't belong together in {list_names(names)}; get it again"
    )


def _blocks_of_method(factors: Sequence[LayerFactors], method: Method) -> list[LayerBlock] | None:
    blocks = []
    for layer in factors:
        layer_block = _block_of(layer, method)
        if layer_block is None:
            return None
        blocks.append(layer_block)
    return blocks


def _fit_together(factors: LayerFactors) -> bool:
    a = factors.a
    b = factors.b
    dim = _rank_axis(factors)
    if a.dim() != b.dim() or a.dim() < dim + 2 or a.numel() == 0:
        return False
    return a.shape[: dim + 1] == (*b.shape[:dim], b.shape[dim + 1])


def _rank_axis(factors: LayerFactors) -> int:
    """Return the axis of the rank in A, which is that of the outputs in B."""
    return 1 if factors.layout.experts_first else 0


def _candidates(factors: Sequence[LayerFactors]) -> Iterator[Method]:
    """Yield the methods that factors may have, those of the smallest blocks first."""
    ranks = {layer.a.shape[_rank_axis(layer)] for layer in factors}
    counts = {count for rank in ranks for count in range(2, rank + 1) if rank % count == 0}
    groups: list[Groups] = [*sorted(counts, reverse=True), ALL_GROUPS, 1]
    for method in METHODS.values():
        yield from filter(None, map(method.with_groups, groups))


def _block_of(factors: LayerFactors, method: Method) -> LayerBlock | None:
    """Return the layer and block of a method that have these factors, or None.

    If the rank is padded with zeros, the padding is cut.
    """
    dim = _rank_axis(factors)
    a = factors.a
    is_nonzero = a.movedim(dim, 0).flatten(1).any(dim=1)  # (rank,)
    nonzero = is_nonzero.nonzero().flatten().tolist()
    unpadded = nonzero[-1] + 1 if nonzero else 0
    for rank in dict.fromkeys((a.shape[dim], unpadded)):
        cut = factors._replace(a=a.narrow(dim, 0, rank), b=factors.b.narrow(dim + 1, 0, rank))
        for r in range(1, rank + 1):
            layer_block = None if rank % r else _block_of_rank(cut, dim, method, r)
            if layer_block is not None:
                return layer_block
    return None


def _block_of_rank(factors: LayerFactors, dim: int, method: Method, r: int) -> LayerBlock | None:
    """Return the layer and block that have just these factors; `dim` is that of the rank in A."""
    name, a, b, layout, scale = factors
    matrices = _matrices(a, b, dim, method)
    if matrices is None:
        return None
    block = method.from_factors(*matrices, r)
    if block is None or block.count_nonzero() < b.count_nonzero():
        return None
    block = method.kept_block(layout, block)
    kernel: tuple[int, ...] = ()
    if method.spans_kernel:  # else the block shows the kernel
        kernel = tuple(a.shape[dim + 2 :])
    layer = BlockSpec.of_block(
        name,
        block.shape,
        method=method.name,
        r=r,
        in_features=a.shape[dim + 1],
        out_features=b.shape[dim],
        scale=scale,
        layout=layout,
        kernel=kernel,
    )
    if layer.reason_against_block(block.shape) is not None:
        return None
    # The block was made from B, say. Whether it is the whole LoRA is seen in its factors.
    of_block = _factors(layer, block.to(torch.promote_types(a.dtype, b.dtype)))
    if of_block is None or of_block[0].shape != a.shape:
        return None
    for made, given in zip(of_block, (a, b)):
        if not torch.equal(made, given.to(made.dtype).reshape(made.shape)):
            return None
    return layer, block


def _matrices(a: Tensor, b: Tensor, dim: int, method: Method) -> tuple[Tensor, Tensor] | None:
    """Return A and B as a method takes them; None if it has none of these shapes.

    It undoes what `_factors` does with the kernel of a convolution.
    """
    rank, _, *kernel = a.shape[dim:]
    if method.spans_kernel:
        if b.shape[dim + 1 :].numel() != rank:  # B has a kernel too
            return None
        return a.flatten(dim + 1), b.flatten(dim + 1)
    k, rest = divmod(rank, math.prod(kernel))  # the rank is k * positions
    if rest:
        return None
    # (*experts, out, rank) -> (*experts, out, k, *kernel) -> (*experts, *kernel, out, k)
    b = b.reshape(*b.shape[: dim + 1], k, *kernel)
    return a, b.movedim((dim, dim + 1), (-2, -1))
