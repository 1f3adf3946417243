"""Models that a function of the user's makes: ``--model module:function``."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from disha import DishaError
from disha.finetune.errors import CheckpointError, SettingsError

__all__ = ["explaining_failures", "load_factory", "logits_for", "logits_of"]

EXPECTED = "an nn.Module, or a pair of an nn.Module and a tokenizer"


def load_factory(spec: str) -> tuple[nn.Module, object | None]:
    """Call the function that `spec` names, and return the model and maybe a tokenizer.

    Modules are looked for in the current directory too, and first.

    Args:
        spec: module:function, such as ``my_models:make_gpt2``; the function takes no arguments.

    Returns:
        The model; and the tokenizer, of whatever kind, or None.

    Raises:
        SettingsError: `spec` is not written so, or there is no such module or function.
        CheckpointError: the module can't be imported, or the function raises or returns
            something else.
    """
    name, _, attribute = spec.partition(":")
    if not (name and attribute) or name.startswith("."):
        raise SettingsError(
            f"--model must be module:function, such as my_models:make_gpt2, got {spec!r}"
        )
    with _current_directory_first():
        function = _function(_module(name, spec), attribute, spec)
        return _checked(_called(function, spec), spec)


def logits_for(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits (batch, time, vocabulary) that any language model returns for tokens.

    Args:
        model: called with nothing but the tokens.
        tokens: (batch, time) token ids.

    Raises:
        CheckpointError: the model fails on them, or returns none.
    """
    try:
        output = model(tokens)
    except (DishaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's own code can raise anything
        raise CheckpointError(
            f"the model given by --model failed{_place(error)} with {type(error).__name__}: "
            f"{error}; a language model is called with token ids (batch, time) alone, here of "
            f"shape {tuple(tokens.shape)}"
        ) from error
    return logits_of(output)


def logits_of(output: object) -> Tensor:
    """The logits in what a language model returned: a tensor, or an object with ``.logits``.

    Raises:
        CheckpointError: it is neither.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"the model returned a {type(output).__name__}; a language model must return its "
            "logits as a tensor, or an object that has them as .logits"
        )
    return found


@contextmanager
def explaining_failures(spec: str | None) -> Iterator[None]:
    """Say in one line how a user's model fails meanwhile, such as on rows that don't fit it.

    Args:
        spec: module:function that made it; None for a model of ours, which is left alone.

    Raises:
        CheckpointError: it does.
    """
    try:
        yield
    except (DishaError, OSError):
        raise
    except Exception as error:
        if spec is None:
            raise
        raise CheckpointError(
            f"--model {spec}: the model failed{_place(error)} with {type(error).__name__}: {error}"
        ) from error


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
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise SettingsError(
                f"--model {spec}: there is no module {error.name!r}, neither installed nor in the "
                f"current directory, {Path.cwd()}"
            ) from error
        raise _failed_import(name, spec, error) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(name, spec, error) from error


def _failed_import(name: str, spec: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"--model {spec}: importing {name} failed{_place(error)} with "
        f"{type(error).__name__}: {error}"
    )


def _function(module: ModuleType, attribute: str, spec: str) -> Callable[[], Any]:
    names = [name for name, value in vars(module).items() if callable(value)]
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, names) or names[:5]
        instead = f"nearest are {', '.join(near)}" if near else "it has no functions"
        raise SettingsError(
            f"--model {spec}: {module.__name__} has no function {attribute!r}; {instead}"
        ) from error
    if not callable(found):
        raise SettingsError(
            f"--model {spec}: {attribute} is a {type(found).__name__}, not a function"
        )
    return found  # type: ignore[no-any-return]


def _called(function: Callable[[], Any], spec: str) -> object:
    try:
        return function()
    except (Exception, SystemExit) as error:  # a script's exit is not this command's
        raise CheckpointError(
            f"--model {spec}: the function, called without arguments, failed{_place(error)} with "
            f"{type(error).__name__}: {error}"
        ) from error


def _checked(made: object, spec: str) -> tuple[nn.Module, object | None]:
    if isinstance(made, nn.Module):
        return _filled(made, spec), None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return _filled(made[0], spec), made[1]
    if isinstance(made, tuple):
        described = f"a tuple of {', '.join(type(one).__name__ for one in made) or 'nothing'}"
    else:
        described = f"a {type(made).__name__}"
    raise CheckpointError(f"--model {spec}: the function returned {described}, not {EXPECTED}")


def _filled(model: nn.Module, spec: str) -> nn.Module:
    """`model`, if its weights have values."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise CheckpointError(
            f"--model {spec}: the function returned a model without weights: {empty[0]} is on the "
            "meta device; load them before it returns"
        )
    return model


def _place(error: BaseException) -> str:
    """Where in the user's code an exception comes from."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
    ]
    return f" at {frames[-1].filename}, line {frames[-1].lineno}," if frames else ""
