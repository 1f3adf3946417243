"""Checkpoints of `Trainer`, and of trainers built on it, that hold the adapter and not the base.

Without this, each holds the complete model, and `Trainer` refuses a quantised model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

import disha
from disha.files import ADAPTER_NAME
from disha.files.disk import OF_TORCH
from disha.integrations.engines import kept_keys, leave_out_base
from disha.model.view import ModelView

__all__ = ["AdapterCheckpoints"]

NO_MODEL = {
    "model_type": f"adapter of disha: load {ADAPTER_NAME} with disha.load_adapter",
    "quantization_config": {},
}
"""The configuration in a checkpoint. `AutoModel` refuses the type, and says it. A class of models
ignores the type, but refuses a quantisation without a method. Without this, it would return a model
of random weights."""

QUANTIZED = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What tells trainers that a model is quantised. They know adapters of PEFT only: `Trainer` refuses
the model, and the trainers of `trl` cast all trainable parameters to bfloat16."""


class AdapterCheckpoints(TrainerCallback):
    """Makes `Trainer` save, resume and choose the adapter alone.

    Make it before the trainer, and pass it in `callbacks`. Then

    - each checkpoint, and each folder of `trainer.save_model`, holds `adapter.safetensors`, which
      `disha.load_adapter` reads, and not the base;
    - `resume_from_checkpoint` and `load_best_model_at_end` load the adapter again, bit for bit;
    - a run that was killed while it wrote a checkpoint resumes from the one before: the next
      trainer sets the incomplete one aside, as `incomplete-checkpoint-N`;
    - `Trainer` accepts a quantised model;
    - `from_pretrained` of a checkpoint raises, and does not return a model without the adapter.

    `model.safetensors` in a checkpoint holds the same values under the keys of the model's state
    dict, because `Trainer` reads these. FSDP and DeepSpeed write and read files of their own. With
    FSDP and ZeRO-3, only checkpoints hold `adapter.safetensors`, so call `disha.save_adapter` on
    all ranks after training.

    Args:
        model: a model of `transformers` with adapters.
        adapter: the name of the adapter to save.

    Raises:
        ArgumentError: the model has no such adapter, or another one is active and trains.

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
        self._adapter = adapter
        self._kept = kept_keys(model, adapter)
        self._quantized = [flag for flag in QUANTIZED if getattr(model, flag, False)]
        for flag in self._quantized:  # hidden while the trainer is made
            setattr(model, flag, False)
        # Trainer warns of other missing keys than these when it loads a checkpoint. Blocks never
        # count as missing, so that a checkpoint of the base can be loaded too.
        base = {key for key in model.state_dict() if ".disha." not in key}
        model._keys_to_ignore_on_save = base - self._kept  # type: ignore[assignment]
        model.save_pretrained = _Saving(model, adapter)  # type: ignore[assignment]

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model be quantised again, and prepare the engine that writes checkpoints."""
        model = given["model"]
        for flag in self._quantized:
            setattr(model, flag, True)
        leave_out_base(model, self._kept, AcceleratorState().distributed_type)
        if args.should_save:
            _set_aside_incomplete(Path(args.output_dir))
        PartialState().wait_for_everyone()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the adapter of a sharded model, for which all ranks must act together."""
        model = given["model"]
        if ModelView(model).sharded:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            disha.save_adapter(model, folder / ADAPTER_NAME, self._adapter)


@dataclass
class _Saving:
    """Stands for `model.save_pretrained`. It can be copied and pickled with the model."""

    model: nn.Module
    adapter: str

    def __call__(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **unused: Any,
    ) -> None:
        """Write the adapter into a folder. A sharded model comes with its state, gathered."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict or {}
        if not ModelView(self.model).sharded:
            disha.save_adapter(self.model, folder / ADAPTER_NAME, self.adapter)
            state = disha.adapter_state_dict(self.model, self.adapter)
        if is_main_process:
            # Copies, because tied weights share memory.
            tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in state.items()}
            save_file(tensors, folder / SAFE_WEIGHTS_NAME, OF_TORCH)
            (folder / CONFIG_NAME).write_text(json.dumps(NO_MODEL))


def _set_aside_incomplete(output: Path) -> None:
    """Rename checkpoints without the trainer's state, which Trainer writes last."""
    for folder in map(Path, sort_checkpoints(str(output))):
        try:
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            aside = folder.with_name(f"incomplete-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
