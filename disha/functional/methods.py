"""The table: what every method does with every layout.

A method is defined on one matrix W (out, in) with n = ceil(in / r) shards of its inputs:

    method   block D                 update dW
    bone     (r, out)                dW[o, i] = D[i mod r, o]
    groups   (r, out)                dW[o, i] = D[i mod r, o] if (i // r) mod g = o mod g, else 0:
                                     Bone with `groups`
    tile     (r, r_out)              dW[o, i] = D[i mod r, o mod r_out]: Bone with r_out
    bat      (ceil(out / r), r, r)   dW_ab = W_ab D_a + D_a for every r x r tile of W
    lora     (r, in + out)           dW = B A, where D is A (r, in) beside B^T (r, out)

A layout (`disha.functional.layouts`) says how a weight becomes a stack of such matrices. The block
of a stack has two forms:

- the one that methods compute with (`matrix_block`): the axes of the stack, then those of D above;
- the one that layers and files keep (`kept_block`): the same, but over a convolution, a D of two
  axes is laid out as the weight is, with r in the place of `in`. Only LoRA has one D for all
  positions of the kernel.

`Method` answers for any layout: `block_shape`, `delta_weight`, `wider_block`, `lora_factors`.
Layers, files, merging and conversions ask it; a method's name stands only in files and arguments.
To add a method: write a subclass of `Method`, and pass an instance to `register_method`.

Source: arXiv 2409.15371, section 3; Hu et al., "LoRA", arXiv 2106.09685.
"""

from __future__ import annotations

from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional.bat import BAT
from disha.functional.bone import BONE
from disha.functional.lora import LORA
from disha.functional.method import METHODS, Method, find_method
from disha.text import brief

METHODS.update({method.name: method for method in (BONE, BAT, LORA)})


def register_method(method: Method) -> None:
    """Make a method known by its name, everywhere: in arguments, files, merging and copies.

    Register it before you load a file that has blocks of it. A second call with the same
    settings replaces the method, also if its class was defined again, as in a notebook.

    Args:
        method: an instance of a subclass of `Method`.

    Raises:
        ArgumentTypeError: `method` is not such an instance, or lacks what a method must define.
        ArgumentError: another method, or another setting of this one, has its name, or the name
            can't be part of a key in a file.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> class Shift(disha.functional.Method):
        ...     block_axes = 1  # dW[o, i] = D[o] + offset
        ...
        ...     def __init__(self, offset):
        ...         self.offset = offset
        ...         self.name = f"shift{offset}"
        ...
        ...     def shape(self, geometry, r, r_out):
        ...         return (*geometry.stack, geometry.out_features)
        ...
        ...     def delta(self, block, geometry, matrices):
        ...         rows = block.unsqueeze(-1) + self.offset
        ...         return rows.expand(*block.shape, geometry.in_features)
        >>> disha.register_method(Shift(2))
        >>> layer = disha.inject_adapters(nn.Linear(3, 1), "all-linear", r=1, method="shift2")
        >>> layer.delta_weight(layer.disha["default"])
        tensor([[2., 2., 2.]], grad_fn=<ExpandBackward0>)
    """
    if not isinstance(method, Method):
        raise ArgumentTypeError(
            f"register_method needs an instance of a subclass of Method, got {brief(method)}"
        )
    cls = type(method)
    missing = []
    if not isinstance(getattr(method, "name", None), str):
        missing.append("name (a str)")
    if cls.shape is Method.shape:
        missing.append("shape")
    if cls.delta is Method.delta and not method.low_rank:
        missing.append("delta, or low_rank = True with factors")
    if missing:
        raise ArgumentTypeError(f"the method {cls.__name__} must define {', '.join(missing)}")
    if not method.name.isidentifier():
        raise ArgumentError(
            f"{brief(method.name)} can't name a method: use letters, digits and underscores, as "
            "in the names of Python"
        )
    for name in (method.name, *method.aliases):
        known = find_method(name)
        if known is not None and not _have_same_class(known, method):
            raise ArgumentError(
                f"there is a method {name!r} already, of the class {type(known).__name__}; give "
                f"{cls.__name__} another name"
            )
        # A file has the name alone, so it could not tell two settings of one name apart.
        if type(known) is cls and vars(known) != vars(method):
            raise ArgumentError(
                f"there is a method {name!r} already, with other settings; files store only the "
                "name, so give each setting its own"
            )
    METHODS[method.name] = method


def _have_same_class(first: Method, second: Method) -> bool:
    """Whether two methods have one class, or classes of one name: a notebook defines it again."""
    first_class = type(first)
    second_class = type(second)
    same_module = first_class.__module__ == second_class.__module__
    return same_module and first_class.__qualname__ == second_class.__qualname__
