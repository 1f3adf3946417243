"""Models that the user's own function makes: ``--model module:function``."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from disha import DishaError
from disha.finetune.errors import CheckpointError, SettingsError

__all__ = ["called", "explaining_failures", "load_factory", "tensor_of"]


def load_factory(spec: str) -> tuple[nn.Module, object | None]:
    """Call the function that `spec` names, and return the model and maybe a tokenizer.

    Modules of the current directory come before installed ones.

    Args:
        spec: module:function, such as ``my_models:make_gpt2``, as `ModelSettings.check` demands.
            The function takes no arguments.

    Returns:
        The model; and the tokenizer, as the function returns it, or None.

    Raises:
        SettingsError: there is no such module or function.
        CheckpointError: the module can't be imported, or the function fails or does not return
            a model.
    """
    name, _, attribute = spec.partition(":")
    with _current_directory_first():
        function = _function(_module(name, spec), attribute, spec)
        try:
            made = function()
        except (Exception, SystemExit) as error:  # a script that exits must not end the command
            raise CheckpointError(
                f"--model {spec}: the function, called without arguments, {_failed(error)}"
            ) from error
    return _model_and_tokenizer(made, spec)


def called(model: nn.Module, tokens: Tensor, **options: Any) -> Any:
    """Call any language model on tokens, and return its output.

    Args:
        model: the model.
        tokens: (batch, time) token ids.
        options: further arguments for the model.

    Raises:
        CheckpointError: the model fails on the tokens.
    """
    try:
        return model(tokens, **options)
    except (DishaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's own code can raise anything
        raise CheckpointError(
            f"the model {_failed(error)}; a language model is called with token ids (batch, time), "
            f"here of shape {tuple(tokens.shape)}"
        ) from error


def tensor_of(output: object) -> Tensor:
    """Return the tensor in a model's output: the output itself, or its ``.logits``.

    Raises:
        CheckpointError: the output is no tensor, and has none as ``.logits``.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"the model returned a {type(output).__name__}; it must return a tensor, or an object "
            "that has one as .logits"
        )
    return found


@contextmanager
def explaining_failures(spec: str | None) -> Iterator[None]:
    """Report in one line that a user's model fails in the block, such as on rows that do not fit.

    Args:
        spec: the module:function that made the model; None for the built-in decoder, whose errors
            stay as they are.

    Raises:
        CheckpointError: the model fails.
    """
    try:
        yield
    except (DishaError, OSError):
        raise
    except Exception as error:
        if spec is None:
            raise
        raise CheckpointError(f"--model {spec}: the model {_failed(error)}") from error


@contextmanager
def _current_directory_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise SettingsError(
                f"--model {spec}: there is no module {missing!r}, neither installed nor in the "
                f"current directory, {Path.cwd()}"
            ) from error
        raise CheckpointError(f"--model {spec}: importing {name} {_failed(error)}") from error


def _function(module: ModuleType, attribute: str, spec: str) -> Any:
    found = getattr(module, attribute, None)
    if callable(found):
        return found
    if hasattr(module, attribute):
        raise SettingsError(
            f"--model {spec}: {attribute} is a {type(found).__name__}, not a function"
        )
    names = [name for name, value in vars(module).items() if callable(value)]
    near = difflib.get_close_matches(attribute, names) or names[:5]
    instead = f"the nearest are {', '.join(near)}" if near else "it has no functions"
    raise SettingsError(
        f"--model {spec}: {module.__name__} has no function {attribute!r}; {instead}"
    )


def _model_and_tokenizer(made: object, spec: str) -> tuple[nn.Module, object | None]:
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        if isinstance(made, tuple):
            found = f"a tuple of {', '.join(type(one).__name__ for one in made) or 'nothing'}"
        else:
            found = f"a {type(made).__name__}"
        raise CheckpointError(
            f"--model {spec}: the function returned {found}; it must return an nn.Module, or a "
            "pair of an nn.Module and a tokenizer"
        )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise CheckpointError(
            f"--model {spec}: the function returned a model without weights: {empty[0]} is on the "
            "meta device; load them before it returns"
        )
    return model, tokenizer


def _failed(error: BaseException) -> str:
    """Describe an exception of the user's code, and where it came from."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
    ]
    place = f" at {frames[-1].filename}, line {frames[-1].lineno}," if frames else ""
    return f"failed{place} with {type(error).__name__}: {error}"
