"""Checkpoints of the `Trainer` of `transformers` that hold the adapter and not the base.

Without this module, `Trainer` works too, but each of its checkpoints holds the complete model, and
it refuses a quantised model. It also works with trainers that build on `Trainer`, such as those of
`trl`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

import disha
from disha.files import ADAPTER_NAME, write_files
from disha.files.pieces import tensor_writer

__all__ = ["AdapterCheckpoints"]

NO_MODEL = {
    "model_type": f"adapter of disha: load {ADAPTER_NAME} with disha.load_adapter",
    "quantization_config": {},
}
"""The configuration in a checkpoint. `AutoModel` refuses the type, and says it. A class of models
ignores the type, but refuses a quantisation without a method. Without this, it would return a model
of random weights."""


class AdapterCheckpoints(TrainerCallback):
    """Makes `Trainer` save, resume and choose the adapter alone.

    Make it before the trainer, and pass it in `callbacks`. Then

    - each checkpoint, and each folder of `trainer.save_model`, holds `adapter.safetensors`, which
      `disha.load_adapter` reads, and not the base;
    - `resume_from_checkpoint` and `load_best_model_at_end` load the adapter again, bit for bit;
    - `Trainer` accepts a quantised model;
    - `from_pretrained` of a checkpoint raises, and does not return a model without the adapter.

    `model.safetensors` in a checkpoint holds the same values under the keys of the model's state
    dict, because `Trainer` reads these.

    Args:
        model: a model of `transformers` with adapters.
        adapter: the name of the adapter to save.

    Raises:
        ArgumentError: the model has no such adapter.

    Examples:
        >>> import pathlib, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> import disha
        >>> from disha.integrations.transformers import AdapterCheckpoints
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> model = disha.inject_adapters(LlamaForCausalLM(config), "all-linear", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, report_to=[])
        ...     trainer = Trainer(model, args, callbacks=[AdapterCheckpoints(model)])
        ...     trainer.save_model()  # as for each checkpoint
        ...     len(disha.inspect_adapter(pathlib.Path(folder, "adapter.safetensors")).layers)
        8
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        kept = disha.adapter_state_dict(model, adapter)
        self._was_quantised = getattr(model, "is_quantized", False)
        if self._was_quantised:
            # Trainer refuses it, because it knows adapters of PEFT only.
            model.is_quantized = False  # type: ignore[assignment]
        # Trainer warns of other missing keys than these when it loads a checkpoint.
        model._keys_to_ignore_on_save = set(model.state_dict()) - set(kept)  # type: ignore[assignment]
        model.save_pretrained = _Saving(model, adapter)  # type: ignore[assignment]

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model be quantised again, once the trainer has accepted it."""
        if self._was_quantised:
            given["model"].is_quantized = True


class _Saving:
    """Stands for `model.save_pretrained`. It can be copied and pickled with the model."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._model, self._adapter = model, adapter

    def __call__(self, save_directory: str, is_main_process: bool = True, **unused: Any) -> None:
        """Write the adapter into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        disha.save_adapter(self._model, folder / ADAPTER_NAME, self._adapter)
        if is_main_process:
            state = disha.adapter_state_dict(self._model, self._adapter)
            tensors = {key: value.to("cpu").contiguous() for key, value in state.items()}
            write_files({folder / SAFE_WEIGHTS_NAME: tensor_writer(tensors, {"format": "pt"})})
            (folder / CONFIG_NAME).write_text(json.dumps(NO_MODEL))
