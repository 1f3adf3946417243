"""The base model, and how it is kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import given

__all__ = ["Bits", "ModelSettings"]

Bits = Literal["bf16", "fp32", "8", "4"]


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    base_model_name_or_path: Path | None = None
    """The model: a folder with config.json, safetensors files and tokenizer.json, or a GGUF file;
    Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3."""

    model: str | None = None
    """Any other model: module:function, a function without arguments that returns an nn.Module,
    or a pair of a module and a tokenizer."""

    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, to use in place of the model's own."""

    bits: Bits = "fp32"
    """How the base model is kept: bf16, fp32, or quantised to 8 or 4 bits (nf4, double
    quantisation). Adapters are trained in float32 either way. A model given by --model is kept as
    it was made, or rounded to bf16."""

    @property
    def base_model(self) -> Path:
        """The file or folder. Raises `SettingsError` if not given."""
        return given(self.base_model_name_or_path, "--base_model_name_or_path path/to/model")

    @property
    def is_named(self) -> bool:
        """Whether it says which model, which the demo need not."""
        return self.base_model_name_or_path is not None or self.model is not None

    @property
    def quantised(self) -> bool:
        """Whether the base model's linear layers are quantised."""
        return self.bits in ("8", "4")

    def check(self) -> None:
        """Check everything that can be checked without reading the model.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        if self.model is None:
            path = self.base_model
            if not path.exists():
                raise SettingsError(
                    f"--base_model_name_or_path {path} does not exist; it must be a folder with "
                    "config.json, safetensors files and tokenizer.json, or a GGUF file "
                    "(models are not downloaded)"
                )
            return
        if self.base_model_name_or_path is not None:
            raise SettingsError(
                "--model and --base_model_name_or_path both say where the model is from; "
                "give one of them"
            )
        module, colon, function = self.model.partition(":")
        if not (module and colon and function):
            raise SettingsError(
                f"--model must be module:function, such as my_models:make_gpt2, got {self.model!r}"
            )
        if self.quantised:
            raise SettingsError(
                f"--bits {self.bits} quantises models given by --base_model_name_or_path only; "
                "leave it out, and let the function return a quantised model"
            )
