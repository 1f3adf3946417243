"""The flags of `disha finetune`: what disha adds, the data, and all of trl's `SFTConfig`."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils.import_utils import is_torch_tf32_available
from trl import SFTConfig

from disha.errors import ArgumentError
from disha.files import find_adapter
from disha.finetune.base import best_device
from disha.finetune.choices import choose, describe, has_bfloat16
from disha.finetune.flags import BITS, FlagParser
from disha.finetune.notes import (
    read_noted_base,
    read_noted_bits,
    read_notes,
    read_settings,
)
from disha.finetune.ranks import start_engine_on_processors

SHOWN = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "bf16",
    "eval_strategy",
    "report_to",
)
"""The flags of `SFTConfig` in the short help."""

USAGE = """disha finetune [flags]

Train an adapter (Bone, tile, BAT, LoRA) for a language model with trl's SFTTrainer.

  disha finetune --base path/to/model --data rows.jsonl --output_dir output
  disha finetune --config run.yaml --learning_rate 1e-4

It takes the flags of trl sft, of PEFT's scripts and of the method's author, and files of axolotl
and LLaMA-Factory too."""


def _flag(default: Any, help: str, **more: Any) -> Any:
    """Return a field of a dataclass that becomes a flag."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={**metadata, "action": "extend"})
    return field(default=default, metadata=metadata)


@dataclass
class AdapterArguments:
    """The base and the adapter."""

    _argument_group_name = "base and adapter"

    base: str | None = _flag(None, "a folder, a GGUF file, or a name such as Qwen/Qwen3-0.6B")
    revision: str | None = _flag(None, "a branch, a tag or a commit of a base on a hub")
    bits: str = _flag(
        "auto", "how the base is stored: as noted, or by the device", choices=("auto", *BITS)
    )
    r: int = _flag(64, "the shard size, or the rank of lora; --rank after torchrun")
    method: str = _flag("bone", "bone (also called miss), bat or lora")
    r_out: int | None = _flag(None, "makes a tile: the columns of its block")
    groups: str = _flag("1", "groups of shards: a number, or all; an output sees one of them")
    target: list[str] = _flag(["all-linear"], "regexes for the names of the weights to adapt")
    exclude: list[str] = _flag([], "regexes for the names of weights to leave out")
    rank_pattern: list[str] = _flag([], "another r for some weights, such as v_proj=16")
    dropout: float = _flag(0.0, "the share of inputs that are set to zero")
    scale: float = _flag(1.0, "the factor of the update: alpha / r of other libraries")
    also_train: list[str] = _flag([], "regexes for other parameters to train, such as norm")
    attn_implementation: str | None = _flag(None, "such as sdpa, eager or flash_attention_2")
    new_tokens: list[str] = _flag([], "tokens to add, whose rows train, such as '<think>'")
    adapter: str | None = _flag(None, "an adapter file to train further; it sets r and targets")
    merge: bool = _flag(False, "also write the base with the adapter merged, into merged/")

    def __post_init__(self) -> None:
        if self.revision:
            self.base = f"{self.base}@{self.revision}"

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `disha.inject_adapters`."""
        groups = int(self.groups) if self.groups.isdigit() else self.groups
        pairs = [pair.rpartition("=") for pair in self.rank_pattern]
        names = ("target", "r", "r_out", "method", "exclude", "also_train", "dropout", "scale")
        settings = {name: getattr(self, name) for name in names}
        ranks = {regex: int(r) for regex, _, r in pairs}
        return {**settings, "groups": groups, "rank_pattern": ranks}

    def settings_for(self, model: Any, new_rows: Collection[int] = ()) -> dict[str, Any]:
        """Return the same for a model: with the rows of new tokens, and without its head.

        trl computes the loss from the head's weight, and an adapter on it takes a dense one. A head
        that is the embedding has the embedding's adapter.
        """
        settings = self.settings()
        table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        patterns = {module: f"^{re.escape(name)}$" for name, module in model.named_modules()}
        if head is not None and head.weight is not table.weight:
            settings["exclude"] = [*self.exclude, patterns[head]]
        if new_rows:
            settings["also_train_rows"] = {
                patterns[layer]: new_rows for layer in (table, head) if layer is not None
            }
        return settings


@dataclass
class DataArguments:
    """The rows to train on, and those to measure the loss on."""

    _argument_group_name = "data"

    data: list[str] = _flag([], "files of rows, globs, folders, or names of data sets")
    dataset_config: str | None = _flag(None, "the configuration of a data set of a hub")
    dataset_split: list[str] = _flag(["train"], "which rows, such as train[:1000]")
    dataset_field: list[str] = _flag([], "those of question and answer, or of a text or messages")
    data_weights: list[float] = _flag([], "how often to draw from each of several data sets")
    eval_data: str | None = _flag(None, "rows to measure the held-out loss on")
    eval_split: str | None = _flag(None, "which rows of eval_data, or of data, to measure on")
    eval_fraction: float = _flag(0.0, "the share of the rows to hold out, such as 0.05")

    def __post_init__(self) -> None:
        if self.eval_fraction and (self.eval_data or self.eval_split):
            raise ArgumentError(
                "--eval_fraction holds out some rows, and --eval_data or --eval_split names them; "
                "leave one out"
            )

    @property
    def measured_on(self) -> str:
        """What the loss is measured on."""
        holds_out = self.eval_data or self.eval_split or self.eval_fraction
        return "held-out" if holds_out else "training"


@dataclass
class TrainingArguments(SFTConfig):  # type: ignore[misc]
    """All of `SFTConfig` with other defaults, and the course of the run."""

    _argument_group_name = "training"

    output_dir: str = _flag("output", "the folder for all that the run writes")
    learning_rate: float | None = _flag(None, "the highest one; by default by the layers")
    num_train_epochs: float = _flag(1.0, "passes over the rows")
    per_device_train_batch_size: int = _flag(4, "rows of a batch, on each process")
    lr_scheduler_type: str = _flag("cosine", "the course of the learning rate")
    warmup_steps: float = _flag(0.03, "steps to full learning rate; below 1, a share of all")
    max_length: int | None = _flag(512, "the most tokens of a row; longer rows are cut")
    eval_strategy: str = _flag("no", "when to measure: no, steps or epoch")
    use_cpu: bool = _flag(False, "train on the processor")
    bf16: bool | None = _flag(False, "compute in bfloat16 where that is safe")
    fp16: bool | None = _flag(None, "compute in float16, with scaled losses, as --bits fp16 does")
    gradient_checkpointing: bool | None = _flag(
        None, "compute again what would need memory; by default on accelerators"
    )
    train_sampling_strategy: str = _flag(
        "group_by_length",
        "how batches are drawn; group_by_length saves padding",
        choices=("random", "sequential", "group_by_length", "batch_rebalance"),
    )
    assistant_only_loss: bool | None = _flag(
        None, "of conversations, learn the answers alone (as far as trl can), or all with False"
    )
    logging_nan_inf_filter: bool = _flag(False, "show the last number where the loss is none")
    save_total_limit: int | None = _flag(2, "how many checkpoints to keep")
    ddp_find_unused_parameters: bool | None = _flag(False, "look for those of idle experts")

    resume_from_checkpoint: str | None = _flag(
        None, "go on from the last checkpoint, or from one that is named", nargs="?", const="True"
    )
    overwrite_output_dir: bool = _flag(False, "start over in a folder that holds a run")
    early_stopping_patience: int | None = _flag(None, "measurements without a lower loss")
    samples: int = _flag(3, "answers to show with and without it; 0: also measure no forgetting")
    dry_run: bool = _flag(False, "show the layers, a row, and whether it fits; write nothing")

    # These would do nothing here, so they are no flags.
    dataset_text_field: str = field(default="text", init=False)
    model_init_kwargs: dict[str, Any] | None = field(default=None, init=False)
    trust_remote_code: bool = field(default=False, init=False)
    eval_on_start: bool = field(default=True, init=False)

    activation_checkpointing: bool | None = field(default=None, init=False)
    """What `gradient_checkpointing` says, of which this is another name."""
    restore_callback_states_from_checkpoint: bool = field(default=True, init=False)
    """A run that resumes goes on counting measurements without a lower loss."""

    def __post_init__(self) -> None:
        self.runs_on = torch.device("cpu") if self.use_cpu else best_device()
        if self.dry_run or not torch.accelerator.is_available():
            self.use_cpu = True
        if self.tf32 and not is_torch_tf32_available():  # type: ignore[has-type]
            warnings.warn("--tf32 does nothing on this machine", stacklevel=2)
            self.tf32 = None
        if self.early_stopping_patience:
            if self.eval_strategy == "no":
                raise ArgumentError("--early_stopping_patience needs an --eval_strategy")
            self.metric_for_best_model = self.metric_for_best_model or "loss"  # type: ignore[has-type]
        super().__post_init__()
        if self.use_cpu and self.world_size > 1:
            start_engine_on_processors(self)

    @property
    def learns_all(self) -> bool:
        """Whether conversations are to be learned whole."""
        if self.assistant_only_loss is None:
            return self.completion_only_loss is False
        return not self.assistant_only_loss


Flags = tuple[AdapterArguments, DataArguments, TrainingArguments]


def parse_flags(words: Sequence[str]) -> Flags:
    """Return the settings that the words of a command line give, and print what was chosen.

    Help is printed, and exits.
    """
    parser = _parser(shows_all="--help_all" in words)
    blank = argparse.Namespace(**{action.dest: None for action in parser._actions})
    flags = vars(parser.parse(words, blank))
    given = {name: value for name, value in flags.items() if value is not None}
    if "adapter" in given:
        given["adapter"] = str(find_adapter(given["adapter"]))
        given |= _settings_of_adapter(given)
    kind = "cpu" if given.get("use_cpu") else best_device().type
    choices = choose(kind, has_bfloat16(kind), given)
    settings = given | {name: choice.value for name, choice in choices.items()}
    try:
        adapter, data, training = parser.parse_dict(settings, allow_extra_keys=True)
    except ValueError as error:  # SFTConfig checks its values, and says clearly what is wrong
        raise ArgumentError(str(error)) from error
    if training.process_index == 0:
        print(f"on {kind}: {describe(choices)}")
    return adapter, data, training


def _settings_of_adapter(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the adapter that is trained further sets; flags must not say otherwise."""
    adapter = given["adapter"]
    settings = read_settings(adapter)
    for name, value in settings.items():
        if given.get(name, value) != value:
            raise ArgumentError(
                f"{adapter} has {name}={value}, which can't change; leave out --{name}"
            )
    notes = read_notes(adapter)
    if "base" not in given:
        settings["base"] = read_noted_base(adapter, notes)
    if given.get("bits", "auto") == "auto":
        settings["bits"] = read_noted_bits(notes)
    return settings


def _parser(shows_all: bool) -> _Parser:
    parser = _Parser(
        [AdapterArguments, DataArguments, TrainingArguments],
        prog="disha finetune",
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=_Format,
    )
    parser.add_argument("--config", help="a YAML file of flags; those of the command line win")
    parser.add_argument("--help_all", action="help", help="show all flags of SFTConfig too")
    hidden = set()
    if not shows_all:
        hidden = {setting.name for setting in fields(SFTConfig)} - set(SHOWN)
    for action in parser._actions:
        if action.type is string_to_bool:  # transformers wants the value of some of these
            action.nargs = "?"
            action.const = True
        if action.dest in hidden or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    return parser


class _Parser(FlagParser, HfArgumentParser):
    """Reads the flags that the fields of dataclasses stand for."""


class _Format(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each name of a flag once, without its form with dashes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(name for name in action.option_strings if "-" not in name[2:])
