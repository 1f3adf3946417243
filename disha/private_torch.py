"""Everything private in torch that the package uses: names that torch may change at any time.

No other module has such names, except for those of `nn.Module` (`_parameters`, `_modules`,
`_buffers`, its hooks), and for methods and attributes that a class overrides. Each name is in all
of torch 2.8 to 2.15, unless its line says otherwise. Importing this module never fails. The last
column says what happens where a torch lacks the name.

    name                                 what it is for                        without it
    torch._subclasses.FakeTensor;        tensors without memory act too          dense
      torch._C._DisableTorchDispatch
    torch._C:
      _are_functorch_transforms_active   nothing is written in place then      as if always: slow
      _autograd                          hooks of tensors that are saved for    a dense copy of a
      ._top_saved_tensors_default_hooks  backward do not nest                   quantised W is kept
      _is_any_autocast_enabled           a quick question before a slow one    the slow one
      _is_tracing                        a quick form of torch.jit.is_tracing  that function
      _current_graph_task_id             whether a thread is one of backward   refuses more
      _len_torch_dispatch_stack          a quick question before a slow one    the slow one
      _VariableFunctions                 private operations have rules too     weights are computed
      _nn                                operations that write                 a copy is written
      _dynamo.eval_frame._FrameAction,   no graph starts in our functions      the compiler raises
      ._FrameExecStrategy
    torch.utils._python_dispatch         selective checkpointing keeps         its backward raises
      ._get_current_dispatch_mode        results: none is written in place
    torch.Tensor._is_view                a view is not written in place        as if always: slow
    autograd.forward_ad._current_level   BAT has no forward-mode derivative    BAT saves more
    torch._grouped_mm                    the product of experts                weights are computed
    F._in_projection,                    attention projects in our way         no dropout or route
      ._in_projection_packed,                                                  in compiled code
      ._check_key_padding_mask
    OpOverloadPacket._qualified_op_name  operations of other libraries         weights are computed
    torch.utils._pytree.tree_leaves      finds weights among arguments         the import fails
    torch._ops.OpOverloadPacket;         what an operation writes into         an operation of it
      .OpOverload._schema                                                      raises
    torch._dynamo.variables.torch        has a copy of what has rules          weights are computed
    torch._dynamo.eval_frame             finds a wrapper, and what is in it    names have it
      .OptimizedModule._orig_mod
    torch.distributed.algorithms         finds a wrapper, and what is in it    names have it
      ._checkpoint, its
      _checkpoint_wrapped_module
    FullyShardedDataParallel             finds a wrapper, and what is in it    names have it
      ._fsdp_wrapped_module
    torch.nested._internal               nested inputs leave functions to      the first injection
      .nested_tensor; NestedTensor       weights                               raises
    torch._functorch.vmap                transforms of `torch.func` get        the first injection
      ._add_batch_dim                    computed weights                      raises
    torch._functorch.eager_transforms    transforms of `torch.func` get        the first injection
      ._wrap_for_grad                    computed weights                      raises
    torch.utils.checkpoint               contexts act again in backward        the first injection
      ._CheckpointFrame                                                        raises
    the function in Module.to_empty      blocks start again                    only those from meta
    nn.init._no_grad_trunc_normal_       W is written, not W + dW              the first injection
                                                                               raises
    torch._functorch.pyfunctorch         weights are computed outside of them  a transform raises
    torch._subclasses.FakeTensorMode;    a dry run adds up the memory of a     the dry run raises
      torch.distributed._tools           step
      .mem_tracker.MemTracker, its
      _mod_tracker
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves as tree_leaves

from disha.errors import DishaError

# --- questions to torch, each with the answer that is safe where torch lacks it ------------------


def _question(place: Any, name: str, otherwise: Any) -> Callable[..., Any]:
    """Return a function of torch, or one that always gives the same answer."""
    return getattr(place, name, lambda *args: otherwise)


transforms_active: Callable[[], bool] = _question(
    torch._C, "_are_functorch_transforms_active", True
)
"""Whether a transform of `torch.func` is running."""

modes_active: Callable[[], int] = _question(torch._C, "_len_torch_dispatch_stack", 1)
"""How many modes see all operations of tensors: of checkpointing, of counting memory, or others."""

_current_mode = _question(_python_dispatch, "_get_current_dispatch_mode", None)


def must_not_write() -> bool:
    """Whether results must stay as they are: in `torch.func` and in selective checkpointing."""
    # A mode of selective checkpointing is in this module. Those that count memory are not.
    return transforms_active() or type(_current_mode()).__module__ == "torch.utils.checkpoint"


saving_hooks: Callable[[bool], Any] = _question(
    getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", True
)
"""The hooks of what is saved for backward, such as those of activation checkpointing, or None.

With True, also those that are set while the compiler traces.
"""

any_autocast: Callable[[], bool] = _question(torch._C, "_is_any_autocast_enabled", True)
"""Whether autocast is on for any device. It knows CPUs and CUDA, and no other device."""

is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Whether `torch.jit.trace` records the operations."""

is_view: Callable[[Tensor], bool] = _question(Tensor, "_is_view", True)
"""Whether a tensor is a view of another one."""

_graph_task = _question(torch._C, "_current_graph_task_id", 0)  # torch returns -1 if none runs


# --- classes, contexts, and names ----------------------------------------------------------------

FakeTensor: Any = getattr(getattr(torch, "_subclasses", None), "FakeTensor", Tensor)
"""A tensor that has a shape, but no memory."""

as_it_is: Any = getattr(torch._C, "_DisableTorchDispatch", nullcontext)
"""A context in which a tensor's class has no say in its operations."""

NATIVE_FUNCTIONS: Any = getattr(torch._C, "_nn", F)
"""What holds some of the functions of `torch.nn.functional`."""

IS_VIEW = "_is_view"
"""A fact of a tensor that needs no values."""

GROUPED = "_grouped_mm"
"""The grouped product, which `F.grouped_mm` (from 2.10) calls."""

OP_NAME = "_qualified_op_name"
"""The attribute with the name of an operation that another library has registered."""

COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod")
"""The wrapper of `torch.compile`: its Python module, its class, and its child, the wrapped one."""

CHECKPOINTED = (
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "ActivationWrapper",
    "_checkpoint_wrapped_module",
)
"""The wrapper of activation checkpointing, in the same three parts."""

FSDP_CHILD = "_fsdp_wrapped_module"
"""The child of `FullyShardedDataParallel` that is the wrapped module."""

ADD_BATCH_DIM = "torch._functorch.vmap:_add_batch_dim"
"""The function that wraps an argument of `torch.vmap`."""

WRAP_FOR_GRAD = "torch._functorch.eager_transforms:_wrap_for_grad"
"""The function that wraps an argument of `torch.func.grad` and `jvp`."""

CHECKPOINT = "torch.utils.checkpoint:_CheckpointFrame"
"""What keeps a function, to run it again in backward."""

NESTED_TENSOR = "torch.nested._internal.nested_tensor:NestedTensor"
"""The class of jagged nested tensors."""

TRUNC_NORMAL = "torch.nn.init:_no_grad_trunc_normal_"
"""What draws the values of a truncated normal distribution."""

OUTSIDE_TRANSFORMS = "torch._functorch.pyfunctorch:temporarily_pop_interpreter_stack"
"""A context in which nothing is transformed."""


def require(place: str) -> Any:
    """Return what torch has at a place "module:attribute", or raise."""
    try:
        return pkgutil.resolve_name(place)
    except (ImportError, AttributeError) as error:
        raise DishaError(
            f"torch {torch.__version__} has no {place}, which disha needs; use another release of "
            "one of them"
        ) from error


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return _graph_task() != -1


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives may be computed."""
    return getattr(forward_ad, "_current_level", 0) >= 0


TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Sees each operation of a thread. torch's page names it, but no public module has it."""


def written_arguments(operation: Any) -> set[int | str]:
    """Return the positions and names of the arguments that an operation writes into.

    A registered operation (`torch.ops`) says so in its schema, any other by the name `out`.
    """
    written: set[int | str] = {"out"}
    overloads: list[Any]
    if isinstance(operation, torch._ops.OpOverloadPacket):
        names: list[str] = operation.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(operation, name) for name in names]
    elif isinstance(operation, torch._ops.OpOverload):
        overloads = [operation]
    else:
        return written
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {position, argument.name}
    return written


def attention_with_projections(separate: Any, packed: Any) -> Any:
    """Return torch's function of attention with these projections, and none of the result."""
    function = F.multi_head_attention_forward
    names = vars(F) | {
        "has_torch_function": lambda tensors: False,
        "_in_projection": separate,
        "_in_projection_packed": packed,
        "linear": lambda x, weight, bias: x,
        "_check_key_padding_mask": _check_padding,
    }
    del names["__name__"]  # else the compiler would look the names up in `F`
    return FunctionType(function.__code__, names, argdefs=function.__defaults__)


def _check_padding(*sizes: Any) -> None:
    if not torch.compiler.is_compiling():  # the compiler can't trace it
        F._check_key_padding_mask(*sizes)  # type: ignore[attr-defined]


def gives_empty_memory(function: Any) -> bool:
    """Whether a function that `nn.Module` applies to its tensors is that of `to_empty()`."""
    return getattr(function, "__qualname__", "").startswith("Module.to_empty.")


def start_no_graph(function: Any) -> None:
    """Keep the compiler from starting a graph at a function of ours, or at one that it calls."""
    with suppress(AttributeError):
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def class_with_apply() -> Any:
    """Return the class whose `apply` every custom function of autograd runs.

    Before torch 2.15, it is the base: a module may have kept the other (`f = Fused.apply`).
    """
    function = torch.autograd.Function
    in_python = hasattr(vars(function)["apply"], "__func__")
    return function.__mro__[1] if in_python else function


def ask_private_operations() -> None:
    """Make the compiler ask a tensor subclass about private operations as well."""
    listed = torch.overrides.get_overridable_functions()[torch]
    names = dir(getattr(torch._C, "_VariableFunctions", None))
    private = [name for name in names if name[0] == "_" and name[1] != "_"]
    functions = {getattr(torch, name) for name in private if hasattr(torch, name)}
    listed.extend(functions.difference(listed))
    compiler = sys.modules.get("torch._dynamo.variables.torch")
    if compiler is not None:  # it keeps a copy of the list
        compiler.get_overridable_functions().update(functions)


def memory_modes() -> tuple[Any, Any]:
    """Return a mode in which tensors have no values, and one that adds up the memory in use."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = MemTracker()
    # Its hooks would also add up the memory of each module, which takes long, and raises for
    # modules with frozen parameters.
    tracker._mod_tracker.register_user_hooks = lambda *hooks: None  # type: ignore[method-assign]
    return fake, tracker
