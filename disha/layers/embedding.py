"""Adapted embeddings: y = W[i] + sum of s D[i mod r]; the row of `padding_idx` stays untouched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha import functional
from disha.layers.adapted import AdaptedLayer, Geometry
from disha.layers.blocks import Block

__all__ = ["AdaptedEmbedding"]

RENORM_EPSILON = 1e-7
"""What torch adds to a norm before it divides max_norm by it."""


class AdaptedEmbedding(AdaptedLayer, nn.Embedding):
    """An `nn.Embedding` with adapters."""

    base_class = nn.Embedding
    original_class = nn.Embedding
    weight_layout = "embedding"

    @classmethod
    def layout(cls, module: nn.Module) -> str | None:
        """Return "embedding", or None where a row is left out, which a block does not tell."""
        assert isinstance(module, nn.Embedding)
        return super().layout(module) if module.padding_idx is None else None

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return num_embeddings as the size of the input, embedding_dim as that of the output."""
        assert isinstance(module, nn.Embedding)
        return Geometry(module.num_embeddings, module.embedding_dim)

    @classmethod
    def misfit(cls, geometry: Geometry, r: int, r_out: int | None) -> str | None:
        """Return why blocks of these sizes don't fit a layer of that geometry, or None."""
        if r > geometry.in_features:
            return f"r={r} is larger than num_embeddings={geometry.in_features}"
        if r_out is not None and geometry.out_features % r_out:
            return f"r_out={r_out} does not divide embedding_dim={geometry.out_features}"
        return None

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return (r, dim), or (r, r_out) for a tile."""
        return (r, cls.geometry(module).out_features if r_out is None else r_out)

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW (num_embeddings, dim) of a block, without its scale."""
        return functional.embedding_delta_weight(
            block.block, self.num_embeddings, self.embedding_dim, self.padding_idx
        )

    @classmethod
    def has_samples(cls, module: nn.Module, input: Tensor) -> bool:
        """Return whether there are several indices."""
        return input.dim() >= 1

    @classmethod
    def example_input(cls, module: nn.Module, generator: torch.Generator) -> Tensor:
        """Return a few random indices of the first half: the module may add an offset to them."""
        rows = max(cls.geometry(module).in_features // 2, 1)
        return torch.randint(rows, (2, 8), generator=generator)

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the embeddings of `input` (...), scaled."""
        delta = functional.embedding_delta(
            input, block.block, self.embedding_dim, block.current_scale(), self.padding_idx
        )
        if not block.drops:
            return delta
        # The input is one-hot: to drop it out is to drop the whole update of a token.
        return delta * block.dropped(torch.ones_like(delta[..., :1]))

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings (..., dim) of indices (...), adapters applied."""
        acting = self.disha.acting()
        if not acting and self.disha.route is None:
            return super().forward(input)
        # With max_norm, torch scales rows of the weight itself, in place; here the sum counts, and
        # the weight stays.
        output = F.embedding(
            input, self.weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        output = self.updated_in_place(output, acting, input)
        return output if self.max_norm is None else self._renormed(output, self.max_norm)

    def _renormed(self, output: Tensor, max_norm: float) -> Tensor:
        norms = torch.linalg.vector_norm(output, self.norm_type, dim=-1, keepdim=True)
        shrunk = output * (max_norm / (norms + RENORM_EPSILON))
        return torch.where(norms > max_norm, shrunk, output)


AdaptedEmbedding.layer_kind = AdaptedEmbedding
