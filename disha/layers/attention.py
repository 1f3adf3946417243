"""`nn.MultiheadAttention` and the modules around it: owners that bypass the layers they own.

`nn.MultiheadAttention` keeps W of q, k and v packed in one parameter and reads the weight of its
`out_proj` without calling it. It is taken over: each of q, k and v becomes a child module, a
`Projection`, which has no parameter of its own but shows its part of the packed one, so that
adapters, names and files know only linear layers.

`nn.TransformerEncoderLayer` and `nn.TransformerEncoder` have fused paths, in evaluation, that read
all weights below them. They are moved to classes that never take these.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha import functional
from disha.errors import ArgumentError
from disha.layers.adapted import AdaptedLayer, WeightSlot, refuse_merged
from disha.layers.blocks import Bat
from disha.layers.classes import Moved, move, move_back

__all__ = [
    "Owner",
    "Projection",
    "connect",
    "connected",
    "disconnect",
    "obstacle_to_taking_over",
    "owner_kind_of",
    "parts_of_attention",
    "take_back",
    "take_over",
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ATTENTION_PARTS = (*PROJECTIONS, "out_proj")
"""The layers of an `nn.MultiheadAttention`, by the names they have for targets and files."""


class Projection(nn.Linear):
    """One of q, k and v of an `nn.MultiheadAttention`: a linear layer that borrows its parameters.

    Args:
        owner: the attention module.
        name: `"q_proj"`, `"k_proj"` or `"v_proj"`.
    """

    owner: nn.MultiheadAttention

    def __init__(self, owner: nn.MultiheadAttention, name: str) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # not a child: the child is this one
        self.name = name
        self.out_features = owner.embed_dim
        sizes = dict(zip(PROJECTIONS, (owner.embed_dim, owner.kdim, owner.vdim), strict=True))
        self.in_features = cast(int, sizes[name])
        self.training = owner.training

    @property
    def _rows(self) -> slice:
        start = PROJECTIONS.index(self.name) * self.out_features
        return slice(start, start + self.out_features)

    @property
    def weight_slot(self) -> WeightSlot:
        """Where the weight is kept: in the owner, packed with the others or on its own."""
        if self.owner._qkv_same_embed_dim:
            return WeightSlot(self.owner, "in_proj_weight", self._rows)
        return WeightSlot(self.owner, f"{self.name}_weight")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (out, in), as the owner has it now."""
        slot = self.weight_slot
        return slot.of(getattr(slot.module, slot.name))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias (out,), as the owner has it now."""
        bias = self.owner.in_proj_bias
        return None if bias is None else bias[self._rows]


def parts_of_attention(module: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """Return the four layers by name; projections that are no children yet are made."""
    return {name: module._modules.get(name) or Projection(module, name) for name in ATTENTION_PARTS}


class Owner(Moved):
    """Base of the classes that owners of bypassed layers are moved to."""

    base_class: ClassVar[type[nn.Module]]


class AdaptedMultiheadAttention(Owner, nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that calls its projections, so that their adapters act."""

    base_class = original_class = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `nn.MultiheadAttention` does, adapters applied; arguments as there."""
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask)
        if is_causal and attn_mask is None:
            raise ArgumentError("is_causal=True is a hint about attn_mask, and needs that too")
        batched = query.dim() == 3
        query, key, value = _sequence_first(query, key, value, self.batch_first, batched)
        mask = functional.additive_mask(attn_mask, query.dtype, "attn_mask")
        padding = functional.additive_mask(key_padding_mask, query.dtype, "key_padding_mask")
        if padding is not None and not batched:
            padding = padding.unsqueeze(0)
        causal = is_causal and padding is None and not need_weights
        output, weights = self._attend(
            *self._projected(query, key, value),
            None if causal else mask,
            padding,
            causal,
            need_weights,
        )
        output = _called(self.out_proj, output)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return output.squeeze(1), weights
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, sequence first, from inputs that are."""
        inputs = (query, key, value)
        projections = [cast(Projection, self._modules[name]) for name in PROJECTIONS]
        acting = [_acting(projection) for projection in projections]
        packed = query is key and key is value and self._qkv_same_embed_dim
        if packed and not (
            any(isinstance(block, Bat) for blocks in acting for block in blocks)
            or any(_is_hooked(projection) for projection in projections)
        ):
            # One product for all three, as in torch, and the same bits.
            base = F.linear(query, cast(Tensor, self.in_proj_weight), self.in_proj_bias)
            outputs = base.chunk(3, dim=-1)
            q, k, v = (
                _with_samples_first(projection, input, output, blocks)
                for projection, input, output, blocks in zip(
                    projections, inputs, outputs, acting, strict=True
                )
            )
        else:
            q, k, v = (
                _called(projection, input)
                for projection, input in zip(projections, inputs, strict=True)
            )
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if self.bias_k is not None and self.bias_v is not None:
            samples = k.shape[1]
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(1, samples, -1)])
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(1, samples, -1)])
            mask = None if mask is None else F.pad(mask, (0, 1))
            padding = None if padding is None else F.pad(padding, (0, 1))
        return functional.attention(
            q,
            k,
            v,
            self.num_heads,
            mask=mask,
            padding=padding,
            zeros=self.add_zero_attn,
            dropout=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            need_weights=need_weights,
        )

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run nested sequences as padded ones; torch takes them for self-attention only."""
        if query is not key or key is not value or not self.batch_first or attn_mask is not None:
            raise ArgumentError(
                "nn.MultiheadAttention takes nested tensors for self-attention with batch_first "
                "and without attn_mask only; pad them (Tensor.to_padded_tensor) and pass "
                "key_padding_mask"
            )
        padded, padding = _padded(query, key_padding_mask)
        output, weights = self.forward(padded, padded, padded, padding, need_weights)
        return _nested_as(output, query), weights

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for projection in self.children():
            if isinstance(projection, AdaptedLayer) and isinstance(projection, Projection):
                name = projection.weight_slot.name
                if prefix + name in state_dict:
                    action = f"load {prefix}{name}, which unmerging would undo,"
                    refuse_merged([projection], action)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class AdaptedTransformerEncoderLayer(Owner, nn.TransformerEncoderLayer):
    """An `nn.TransformerEncoderLayer` that calls its layers also in evaluation."""

    base_class = original_class = nn.TransformerEncoderLayer

    @property
    def activation_relu_or_gelu(self) -> int:
        """0, which tells torch that its fused path does not apply."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return what `nn.TransformerEncoderLayer` does, adapters applied; arguments as there."""
        if not src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src_mask is not None:
            raise ArgumentError(
                "nn.TransformerEncoderLayer takes no src_mask with nested tensors; pad them "
                "(Tensor.to_padded_tensor) and pass src_key_padding_mask"
            )
        padded, padding = _padded(src, src_key_padding_mask)
        return _nested_as(super().forward(padded, None, padding), src)


class AdaptedTransformerEncoder(Owner, nn.TransformerEncoder):
    """An `nn.TransformerEncoder` that calls its layers with padded, not with nested tensors."""

    base_class = original_class = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:
        """False: the nested tensors are for the fused path."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return what `nn.TransformerEncoder` does, adapters applied; arguments as there."""
        output = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or mask is not None or src.dim() != 3:
            return output
        padding = src_key_padding_mask != 0
        if not self._torch_would_nest(padding):
            return output
        # Nested sequences have no padding; torch then fills it with zeros, before the last norm.
        filler = output.new_zeros(1, 1, output.shape[-1])  # 3-d, as a norm may expect
        filler = filler if self.norm is None else self.norm(filler)
        return torch.where(padding.unsqueeze(-1), filler, output)

    def _torch_would_nest(self, padding: Tensor) -> bool:
        """Whether the original class would turn this batch into nested sequences."""
        if not self.__dict__.get("use_nested_tensor", False) or self.layers[0].training:
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled():
            return False
        if not torch.backends.mha.get_fastpath_enabled():
            return False
        if not getattr(self, "mask_check", True):
            return True
        if torch.compiler.is_compiling():
            return False
        return not bool((padding[:, :-1] & ~padding[:, 1:]).any())


OWNER_KINDS: tuple[type[Owner], ...] = (
    AdaptedMultiheadAttention,
    AdaptedTransformerEncoderLayer,
    AdaptedTransformerEncoder,
)
for _kind in OWNER_KINDS:
    _kind.layer_kind = _kind


def obstacle_to_taking_over(module: nn.MultiheadAttention) -> str | None:
    """Return why the projections of an attention module can't be made layers, or None."""
    name = type(module).__name__
    forwards = (nn.MultiheadAttention.forward, AdaptedMultiheadAttention.forward)
    if type(module).forward not in forwards:
        return f"{name} has a forward of its own, so that its projections can't be made layers"
    for projection in PROJECTIONS:
        if not isinstance(module._modules.get(projection), Projection | None):
            return f"{name} has a child {projection!r} of its own, where a projection would be"
    return None


def owner_kind_of(module: nn.Module) -> type[Owner] | None:
    """Return the class that takes `module` over when a layer below it is adapted, or None."""
    if isinstance(module, nn.MultiheadAttention) and obstacle_to_taking_over(module) is not None:
        return None  # what can be adapted below is what its own forward calls
    return next((kind for kind in OWNER_KINDS if isinstance(module, kind.base_class)), None)


def take_over(module: nn.Module, kind: type[Owner]) -> Owner:
    """Let an owner call the layers below it. Undone by `take_back`."""
    owner = move(module, kind)
    if isinstance(owner, AdaptedMultiheadAttention):
        for name, part in parts_of_attention(owner).items():
            owner._modules.setdefault(name, part)
    return owner


def take_back(owner: Owner) -> None:
    """Make an owner what it was."""
    if isinstance(owner, AdaptedMultiheadAttention):
        for name in PROJECTIONS:
            owner._modules.pop(name, None)
    move_back(owner)


def connected(projection: Projection) -> bool:
    """Whether a projection is a child of its owner."""
    return projection.owner._modules.get(projection.name) is projection


def connect(projection: Projection) -> None:
    """Make a projection a child of its owner. Undone by `disconnect`."""
    projection.owner._modules[projection.name] = projection


def disconnect(projection: Projection) -> None:
    """Undo `connect`."""
    projection.owner._modules.pop(projection.name, None)


def _acting(projection: nn.Module) -> tuple[nn.Module, ...]:
    return projection.disha.acting() if isinstance(projection, AdaptedLayer) else ()


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _with_samples_first(
    projection: nn.Module, input: Tensor, output: Tensor, blocks: Any
) -> Tensor:
    """Return a projection's output plus its updates, both sequence first."""
    if not isinstance(projection, AdaptedLayer):
        return output
    updated = projection.updated(output.transpose(0, 1), blocks, input.transpose(0, 1))
    return updated.transpose(0, 1)


def _called(layer: nn.Module, input: Tensor) -> Tensor:
    """Call a linear layer on an input that is sequence first; routing wants samples first."""
    if isinstance(layer, AdaptedLayer) and layer.disha.route is not None:
        return cast(Tensor, layer(input.transpose(0, 1))).transpose(0, 1)
    return cast(Tensor, layer(input))


def _sequence_first(
    query: Tensor, key: Tensor, value: Tensor, batch_first: bool, batched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three as (positions, samples, width); what was one tensor stays one."""

    def turned(tensor: Tensor) -> Tensor:
        if not batched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if batch_first else tensor

    first = turned(query)
    second = first if key is query else turned(key)
    if value is query:
        return first, second, first
    return first, second, second if value is key else turned(value)


def _padded(nested: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return nested sequences (N, *, E) as a padded tensor, and a mask that is True on padding."""
    if padding is not None:
        raise ArgumentError(
            "a nested tensor has no padding, so it takes no key_padding_mask; leave that out"
        )
    padded = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=padded.device)
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, positions >= lengths.unsqueeze(1)


def _nested_as(padded: Tensor, nested: Tensor) -> Tensor:
    """Return a padded tensor as nested sequences of the lengths that `nested` has."""
    sequences = [row[: len(one)] for row, one in zip(padded, nested.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(sequences, layout=nested.layout)
