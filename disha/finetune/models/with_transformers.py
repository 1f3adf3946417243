"""Language models that the built-in decoder does not read, through the library transformers.

`open_with_transformers` takes the folder of any causal language model that the library can load
from safetensors files. Code in the folder never runs. If weights are missing, that is an error,
because the library would fill them with random numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disha import DishaError
from disha.finetune.errors import (
    CheckpointError,
    TokenizerError,
    UnsupportedModelError,
    raised_as,
)
from disha.finetune.hashing import add_state
from disha.finetune.models.quantised import FOUR_BIT, WeightBits, require_bitsandbytes

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["TransformersModel", "open_with_transformers", "save"]

LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class TransformersModel:
    """The folder of a model that transformers knows.

    Args:
        folder: the folder.
        config: what its config.json says, as transformers understands it.
    """

    folder: Path
    config: Any

    def load_model(
        self,
        dtype: torch.dtype | str,
        device: torch.device,
        bits: WeightBits | None = None,
        digest: Hash | None = None,
    ) -> nn.Module:
        """Return the model, with its weights.

        Args:
            dtype: the number format of weights that are not quantised, and of products; or auto,
                for that of the files.
            device: where the weights go.
            bits: 8 or 4 to quantise the linear layers, without the output head.
            digest: a hash to add the model's weights to.

        Raises:
            CheckpointError: weights are missing or don't fit, or the model does not work.
            MissingPackageError: `bits` is given, but a package for it is not installed.
        """
        options: dict[str, Any] = {
            "dtype": dtype,
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            **LOCAL,
        }
        if bits is not None:
            options |= {"quantization_config": self._quantised_to(bits, dtype)}
            options |= {"device_map": {"": device}}
        with _explained(f"{self.folder} can't be loaded by transformers"):
            model, found = _library("AutoModelForCausalLM").from_pretrained(
                self.folder, config=self.config, **options
            )
        self._require_complete(found)
        if digest is not None:
            add_state(digest, model.state_dict())
        if bits is None:
            model.to(device)
        self._try(model.eval(), bits)
        made: nn.Module = model
        return made

    def outline(self) -> nn.Module:
        """Return the model with shapes, but no values.

        Raises:
            CheckpointError: config.json describes no such model.
        """
        with _explained(f"{self.folder / 'config.json'} describes no model"), torch.device("meta"):
            made: nn.Module = _library("AutoModelForCausalLM").from_config(self.config)
        return made

    def tokenizer(self) -> Any:
        """Return the tokenizer of the folder's own files, as transformers reads them.

        Raises:
            TokenizerError: it can't be read.
        """
        problem = f"the tokenizer of {self.folder} can't be read"
        with raised_as(TokenizerError), _explained(problem):
            return _library("AutoTokenizer").from_pretrained(self.folder, **LOCAL)

    def _quantised_to(self, bits: WeightBits, dtype: torch.dtype | str) -> Any:
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError(
                f"{self.folder} has a quantization_config: its weights are quantised already, so "
                f"--bits {bits} can't quantise them; give --bits bf16, which keeps them as they are"
            )
        require_bitsandbytes()
        if bits == 8:
            return _library("BitsAndBytesConfig")(load_in_8bit=True)
        return _library("BitsAndBytesConfig")(
            load_in_4bit=True,
            bnb_4bit_quant_type=FOUR_BIT["quant_type"],
            bnb_4bit_use_double_quant=FOUR_BIT["compress_statistics"],
            bnb_4bit_compute_dtype=dtype,
        )

    def _require_complete(self, found: Mapping[str, Any]) -> None:
        wrong = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
        if wrong:
            raise CheckpointError(
                f"{self.folder} does not hold the tensors that its own configuration calls for: "
                f"{min(wrong)} is missing or of another shape ({len(wrong)} such); get the folder "
                "again"
            )

    @torch.no_grad()
    def _try(self, model: Any, bits: WeightBits | None) -> None:
        """Raise if the model fails on a text of two tokens, or looks ahead."""
        tokens = torch.tensor([[0, 1], [0, 2]], device=model.device)
        layers = "" if bits is None else f" in {bits} bits (give --bits bf16)"
        with _explained(f"the model of {self.folder} does not work{layers}"):
            first, other = model(tokens).logits[:, 0].float()
        allowed = math.sqrt(torch.finfo(model.dtype).eps) * first.abs().max()  # rounding
        if bits is None and (first - other).abs().max() > allowed:
            raise CheckpointError(
                f"the model of {self.folder} ({type(model).__name__}) sees the tokens that it is "
                "to predict, so it can't learn to continue a text; give a causal language model"
            )


def open_with_transformers(
    folder: Path, described: Mapping[str, Any], reason: UnsupportedModelError
) -> TransformersModel:
    """Open the folder of a model, without reading weights.

    Args:
        folder: the folder.
        described: the content of its config.json.
        reason: why the built-in decoder does not read it.

    Raises:
        UnsupportedModelError: transformers is not installed; its message names the extra.
        CheckpointError: transformers does not know such a language model, or it needs code of its
            own.
    """
    if importlib.util.find_spec("transformers") is None:
        raise reason
    _quiet()
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in _library("CONFIG_MAPPING"):
        own = " (the code that comes with it is never run)" if "auto_map" in described else ""
        raise CheckpointError(
            f"{folder} holds a model of architecture {kind!r:.60}, which transformers "
            f"{_library('__version__')} does not know{own}; install a newer one, or give the model "
            "as --model module:function"
        )
    with _explained(f"{folder / 'config.json'} can't be read by transformers"):
        config = _library("AutoConfig").from_pretrained(folder, **LOCAL)
    if type(config) not in _library("MODEL_FOR_CAUSAL_LM_MAPPING"):
        raise CheckpointError(
            f"{folder} holds a model of architecture {kind!r}, which is no language model to "
            "transformers; give a causal language model, or --model module:function"
        )
    if hasattr(config, "rescale_every"):  # with it, RWKV changes its own weights in place
        config.rescale_every = 0
    return TransformersModel(folder, config)


def save(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model of transformers as its files were, with other values.

    Raises:
        CheckpointError: it can't be written so.
    """
    with _explained(f"transformers can't write the model to {folder}"):
        model.save_pretrained(folder, state_dict=dict(state))


def _quiet() -> None:
    """Turn off the library's messages and progress bars. The command has its own."""
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _library(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """If the block fails, report in one line what transformers can't do."""
    try:
        yield
    except (DishaError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its models raise anything
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{what}: {said}") from error
