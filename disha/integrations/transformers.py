"""Checkpoints of the `Trainer` of `transformers` that hold the adapter and not the base.

Without this module, `Trainer` works too, but each of its checkpoints holds the complete model, and
it refuses a quantised model. It also works with trainers that build on `Trainer`, such as those of
`trl`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
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

QUANTISED = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What tells trainers that a model is quantised. They know adapters of PEFT only: `Trainer` refuses
the model, and the trainers of `trl` cast all trainable parameters to bfloat16."""


class AdapterCheckpoints(TrainerCallback):
    """Makes `Trainer` save, resume and choose the adapter alone.

    Make it before the trainer, and pass it in `callbacks`. Then

    - each checkpoint, and each folder of `trainer.save_model`, holds `adapter.safetensors`, which
      `disha.load_adapter` reads, and not the base;
    - `resume_from_checkpoint` and `load_best_model_at_end` load the adapter again, bit for bit;
    - `Trainer` accepts a quantised model;
    - `from_pretrained` of a checkpoint raises, and does not return a model without the adapter.

    `model.safetensors` in a checkpoint holds the same values under the keys of the model's state
    dict, because `Trainer` reads these. The trainer refuses to start with FSDP and with DeepSpeed,
    which save the base in any case.

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
        self._quantised = [flag for flag in QUANTISED if getattr(model, flag, False)]
        for flag in self._quantised:
            setattr(model, flag, False)
        # Trainer warns of other missing keys than these when it loads a checkpoint. Blocks never
        # count as missing, so that a checkpoint of the base can be loaded too.
        base = {key for key in model.state_dict() if ".disha." not in key}
        model._keys_to_ignore_on_save = base - set(kept)  # type: ignore[assignment]
        model.save_pretrained = _Saving(model, adapter)  # type: ignore[assignment]

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model be quantised again. Refuse what would not be trained, or not be saved.

        Raises:
            ArgumentError: FSDP or DeepSpeed shards the model, or a trainer of `trl` would not train
                an adapter on the output head.
        """
        for flag in self._quantised:
            setattr(given["model"], flag, True)
        kind = AcceleratorState().distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise disha.ArgumentError(
                f"with {kind.value}, Trainer saves and resumes in a way of its own, and writes the "
                "base too; leave out AdapterCheckpoints, and call disha.save_adapter on all ranks "
                "after training"
            )
        if any(cls.__module__.startswith("trl.") for cls in type(args).__mro__):
            refuse_adapted_head(given["model"])


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


def refuse_adapted_head(model: Any) -> None:
    """Raise if an adapter is on the output head, where the trainers of `trl` can't train it.

    They compute the loss and its gradients from the weight of the head themselves.

    Args:
        model: a model of `transformers`.

    Raises:
        ArgumentError: an adapter is on the output head.
    """
    head = model.get_output_embeddings()
    if isinstance(head, disha.AdaptedLayer):
        raise disha.ArgumentError(
            "an adapter is on the output head, and the trainers of trl compute the loss from the "
            "head's weight in a way that gives the adapter no gradient; leave the head out, such "
            "as with exclude='lm_head'"
        )
