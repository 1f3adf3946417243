"""Facts: what an operation asks of an effective weight without its values. W answers."""

from __future__ import annotations

from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor

from disha.effective.rules import Operation, rule, rule_with_operation
from disha.effective.weight import base_inside, compute, compute_first
from disha.private_torch import IS_VIEW

_VIEW_PROPERTIES = {"H", "T", "data", "imag", "mH", "mT", "real"}
"""Properties of a tensor that are views of its values, and so no facts."""

_FACT_PROPERTIES = [
    name
    for name in dir(Tensor)
    if isinstance(getattr(Tensor, name), GetSetDescriptorType)
    and not name.startswith("__")
    and name not in _VIEW_PROPERTIES
]


@rule_with_operation(
    *_FACT_PROPERTIES,
    IS_VIEW,
    "dim size stride numel nelement ndimension element_size is_floating_point is_complex is_signed "
    "is_contiguous is_inference is_conj is_neg is_pinned is_shared get_device storage_offset "
    "dim_order __len__ __hash__ is_coalesced is_same_size result_type "
    "register_hook register_post_accumulate_grad_hook retain_grad",
)
def _ask_base(func: Operation, *args: Any, **kwargs: Any) -> Any:
    named = {name: base_inside(value) for name, value in kwargs.items()}
    return func(*map(base_inside, args), **named)


@rule_with_operation(*(name for name in dir(torch) if name.endswith("_like")))
@rule_with_operation(*(name for name in dir(Tensor) if name.startswith("new_")))
def _create_like(func: Operation, like: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a tensor like W. The other arguments may be values, so their weights are computed."""
    return compute_first(func, (base_inside(like), *args), kwargs)


@rule(Tensor.data_ptr)
def _data_ptr(weight: Any) -> int:
    # The caller uses the address after the call, so the values live as long as the weight.
    values = compute(weight)
    weight.__dict__["values_at_data_ptr"] = values
    return values.data_ptr()


@rule(torch.autograd.grad)
def _differentiate(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the gradient of W as that of an effective weight."""
    return compute_first(torch.autograd.grad, (outputs, base_inside(inputs), *args), kwargs)
