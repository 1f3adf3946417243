"""The errors that disha raises on purpose, and its warning.

Each error is a `DishaError`, so one `except` catches them all. Each is also the built-in error that
Python users expect for its cause. Messages say what was asked, what was found, what is allowed
and what to do.
"""

from __future__ import annotations

from disha.text import printable


class DishaError(Exception):
    """Base class of all errors that the library raises on purpose.

    docs/guides/troubleshooting.md has the messages that users meet, with causes and remedies.

    Examples:
        >>> import disha
        >>> from torch import nn
        >>> try:
        ...     disha.inject_adapters(nn.Linear(4, 4), "all-linear", r=0)
        ... except disha.DishaError as error:
        ...     print(error)
        r must be at least 1, got 0
    """

    def __init__(self, *args: object) -> None:
        safe_args = []
        for arg in args:
            if isinstance(arg, str):  # a message, which may have names from an untrusted file
                arg = printable(arg, lines=True)
            safe_args.append(arg)
        super().__init__(*safe_args)


class ArgumentError(DishaError, ValueError):
    """An argument has a value that is not allowed. Also a `ValueError`.

    Examples:
        >>> import disha
        >>> disha.BoneLinear(8, 4, r=9)
        Traceback (most recent call last):
        ...
        disha.errors.ArgumentError: BoneLinear: r=9 is larger than in_features=8
    """


class ArgumentTypeError(DishaError, TypeError):
    """An argument is of a type that is not allowed. Also a `TypeError`.

    Examples:
        >>> import disha
        >>> disha.BoneLinear(8, 4, r="9")
        Traceback (most recent call last):
        ...
        disha.errors.ArgumentTypeError: r must be an int of at least 1, got '9' of type str
    """


class TargetError(ArgumentError):
    """The target selects nothing, or only modules that can't be adapted. An `ArgumentError`.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "q_proj", r=4)
        Traceback (most recent call last):
        ...
        disha.errors.TargetError: target_regex='q_proj' selects no layer that can be adapted; the
        nearest names are '0'
    """


class AdapterStateError(DishaError, ValueError):
    """A state dict does not fit its adapter, or an adapter has no valid values. Also `ValueError`.

    Examples:
        >>> import torch
        >>> import disha
        >>> layer = disha.BoneLinear(8, 4, r=4)
        >>> disha.load_adapter_state_dict(layer, {"disha.default.bone_block": torch.zeros(4, 8)})
        Traceback (most recent call last):
        ...
        disha.errors.AdapterStateError: the state does not fit the model's adapter 'default';
        nothing was loaded: 0 keys fit
        wrong: disha.default.bone_block has the shape (4, 8), must be (4, 4)
    """


class AdapterFileError(DishaError, ValueError):
    """A file is not a valid adapter file, or does not fit the model. Also a `ValueError`."""


class AdapterIOError(DishaError, OSError):
    """A file could not be read or written. Also an `OSError`.

    Examples:
        >>> import disha
        >>> disha.inspect_adapter("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        disha.errors.AdapterIOError: can't read nowhere.safetensors: No such file or directory;
        check the path
    """


class ConversionError(DishaError, ValueError):
    """Another format can't express an adapter, or only with too large an error.

    Also a `ValueError`.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Sequential(nn.Conv1d(8, 4, 3, groups=2))
        >>> disha.interop.lora.export(disha.inject_adapters(model, "0", r=2), "as-lora")
        Traceback (most recent call last):
        ...
        disha.errors.ConversionError: PEFT's LoRA would not compute what this adapter does, so
        nothing was written:
        0: its convolution has groups=2, and PEFT's LoRA can't merge these
        Leave these layers out (`exclude`), or merge (merge_adapters)
    """


class MissingPackageError(DishaError, ImportError):
    """An operation needs a package that is not installed. Also an `ImportError`."""


class ModeError(DishaError, RuntimeError):
    """The operation is not possible while adapters are disabled, routed or merged.

    Also a `RuntimeError`.

    Examples:
        >>> import disha
        >>> layer = disha.BoneLinear(8, 4, r=4)
        >>> with disha.adapters_disabled(layer):
        ...     disha.inject_adapters(layer, "all-linear", r=2, adapter="second")
        Traceback (most recent call last):
        ...
        disha.errors.ModeError: can't add an adapter inside adapters_disabled; leave it first
    """


class MergeError(ModeError):
    """An operation is not possible while adapters are merged, or can't merge. A `ModeError`.

    Examples:
        >>> import disha
        >>> layer = disha.BoneLinear(8, 4, r=4)
        >>> _ = disha.merge_adapters(layer)
        >>> disha.remove_adapters(layer)
        Traceback (most recent call last):
        ...
        disha.errors.MergeError: can't remove adapters while adapters are merged (now: 'default');
        call unmerge_adapters(model) first
    """


class AdapterFileWarning(UserWarning):
    """An adapter does not belong to the base, or to that of the adapters it is combined with."""
