"""The flags of `disha finetune`: what disha adds, the data, and all of trl's `SFTConfig`."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from accelerate import DistributedType
from transformers import HfArgumentParser
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.utils.import_utils import is_torch_tf32_available
from trl import SFTConfig

import disha
from disha.errors import ArgumentError, DishaError, MissingPackageError
from disha.files import find_adapter
from disha.finetune.base import best_device, make_on_meta, read_text
from disha.finetune.choices import choose, describe, read_device
from disha.finetune.notes import (
    BITS,
    read_noted_base,
    read_noted_bits,
    read_notes,
    read_settings,
)
from disha.text import nearest

TRAINER_STATE = "trainer_state.json"
"""What a complete checkpoint has; its name in `transformers.trainer`, which is slow to import."""

RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "dataset_text_field": "dataset_field",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "output": "output_dir",
    "warmup_ratio": "warmup_steps",  # below 1, it is a ratio
}
"""Short names, and names that `transformers` and `trl` have changed -> the names of today."""

OF_OTHERS = {
    "load_in_4bit": "--bits 4",
    "load_in_8bit": "--bits 8",
    "lora_alpha": "--learning_rate, because the update of this adapter has no scale of its own",
    "lora_dropout": "--dropout",
    "lora_r": "--r",
    "lora_rank": "--r",
    "lora_target": "--target",
    "lora_target_modules": "--target",
    "model": "--base",
    "model_name_or_path": "--base",
    "dataset": "--data",
    "dataset_name": "--data",
    "resume_from": "--resume",
}
"""Flags of other programs -> what to use here."""

REFUSED = {
    "model_init_kwargs": "the base is loaded here; use --bits and --attn_implementation",
    "trust_remote_code": "code in the folder of a model never runs",
}
"""Flags of `SFTConfig` that would do nothing -> why."""

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
"""The flags of `SFTConfig` that must be at least 1, and that it does not check."""

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
  disha finetune --config run.yaml --learning_rate 1e-4"""


def _flag(default: Any, help: str, *aliases: str, **more: Any) -> Any:
    """Return a field of a dataclass that becomes a flag."""
    metadata = {"help": help, "aliases": list(aliases), **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AdapterArguments:
    """The base and the adapter."""

    _argument_group_name = "base and adapter"

    base: str | None = _flag(
        None,
        "the model: a folder, a GGUF file, or a name such as Qwen/Qwen3-0.6B",
        "--base_model_name_or_path",
    )
    bits: str = _flag(
        "auto",
        "how the base is stored: auto is as noted, or by the device; 8 and 4 quantise it",
        choices=("auto", *BITS),
    )
    # torchrun takes --r for an abbreviation of its own flags.
    r: int = _flag(64, "the shard size, or the rank of lora", "--bone_r", "--rank")
    method: str = _flag("bone", "bone (also called miss), bat or lora")
    init_weights: str | None = _flag(
        None, "the method in the author's words: True or bat", choices=("True", "bat")
    )
    r_out: int | None = _flag(None, "makes a tile: the columns of its block", "--bone_r_out")
    groups: str = _flag("1", "groups of shards: a number, or all; an output sees one of them")
    target: list[str] = _flag(["all-linear"], "regexes for the names of the weights to adapt")
    exclude: list[str] = _flag([], "regexes for the names of weights to leave out")
    rank_pattern: list[str] = _flag([], "another r for some weights, such as v_proj=16")
    dropout: float = _flag(0.0, "the share of inputs that are set to zero", "--adapter_dropout")
    also_train: list[str] = _flag([], "regexes for other parameters to train, such as norm")
    attn_implementation: str | None = _flag(
        None, "how attention is computed, such as sdpa, eager or flash_attention_2"
    )
    new_tokens: list[str] = _flag([], "tokens to add, whose rows train, such as '<think>'")
    adapter: str | None = _flag(None, "an adapter file to train further; it sets r and targets")
    merge: bool = _flag(False, "also write the base with the adapter merged, into merged/")

    def __post_init__(self) -> None:
        self.new_tokens = list(dict.fromkeys(self.new_tokens))  # each once, in order
        if "" in self.new_tokens:
            raise ArgumentError("--new_tokens must not hold an empty text")
        for pattern in [*self.target, *self.exclude]:
            if re.fullmatch(r"\w[\w.]*(,[\w.]+)+", pattern):  # no name has a comma
                raise ArgumentError(
                    f"{pattern} matches no name; separate names by spaces: "
                    f"{pattern.replace(',', ' ')}"
                )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `disha.inject_adapters`."""
        targets: str | list[str] = [*self.target]
        if len(targets) == 1:
            targets = targets[0]
        return {
            "target_regex": targets,
            "r": self.r,
            "r_out": self.r_out,
            "method": self.method,
            "exclude": [*self.exclude],
            "rank_pattern": dict(_split_rank_pattern(pair) for pair in self.rank_pattern),
            "also_train": self.also_train,
            "dropout": self.dropout,
        }

    def settings_for(self, model: Any) -> dict[str, Any]:
        """Return the same for a model: without its head, unless that is the embedding."""
        settings = self.settings()
        head = model.get_output_embeddings()
        # trl computes the loss from the head's weight, and an adapter on it takes a dense one.
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            names = [name for name, module in model.named_modules() if module is head]
            settings["exclude"] += [f"^{re.escape(name)}$" for name in names]
        return settings


@dataclass
class DataArguments:
    """The rows to train on, and those to measure the loss on."""

    _argument_group_name = "data"

    data: list[str] = _flag(
        [],
        "json, jsonl, csv, parquet or text files, globs, folders, or names of data sets",
        "--data_path",
    )
    dataset_split: list[str] = _flag(["train"], "which rows, such as train[:1000]")
    dataset_field: list[str] = _flag(
        [], "the fields with question and answer, or the field with a text or messages"
    )
    data_weights: list[float] = _flag([], "how often to draw from each of several data sets")
    eval_data: str | None = _flag(None, "rows to measure the held-out loss on", "--eval_path")
    eval_split: str | None = _flag(None, "which rows of eval_data, or of data, to measure on")
    eval_fraction: float = _flag(0.0, "the share of the rows to hold out, such as 0.05")

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ArgumentError(f"--eval_fraction must be below 1, got {self.eval_fraction}")
        if self.eval_fraction and (self.eval_data or self.eval_split):
            raise ArgumentError(
                "--eval_fraction holds out some rows, and --eval_data or --eval_split names them; "
                "leave one out"
            )


@dataclass
class TrainingArguments(SFTConfig):  # type: ignore[misc]
    """All of `SFTConfig` with other defaults, and the course of the run."""

    _argument_group_name = "training"

    output_dir: str = _flag("output", "the folder for all that the run writes")
    learning_rate: float | None = _flag(
        None, "the highest learning rate; by default by the size of the base"
    )
    num_train_epochs: float = _flag(1.0, "passes over the rows")
    per_device_train_batch_size: int = _flag(4, "rows of a batch, on each process")
    lr_scheduler_type: str = _flag("cosine", "the course of the learning rate")
    warmup_steps: float = _flag(0.03, "steps to full learning rate; below 1, a share of all")
    max_length: int | None = _flag(512, "the most tokens of a row; longer rows are cut")
    bf16: bool | None = _flag(False, "compute in bfloat16 where that is safe")
    fp16: bool | None = _flag(
        None,
        "compute in float16, with scaled losses; by default with --bits fp16",
        nargs="?",
        const=True,
    )
    gradient_checkpointing: bool | None = _flag(
        None,
        "compute again what would need memory; by default on accelerators",
        nargs="?",
        const=True,
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
    ddp_find_unused_parameters: bool | None = _flag(
        False, "look for parameters that a batch does not use, such as those of idle experts"
    )
    report_to: str = _flag("none", "none, or such as tensorboard or wandb")

    resume: bool = _flag(False, "go on from the last complete checkpoint")
    overwrite_output_dir: bool = _flag(False, "start over in a folder that holds a run")
    early_stopping_patience: int | None = _flag(
        None, "stop after so many measurements without a lower loss"
    )
    samples: int = _flag(
        3, "how many answers to show with and without the adapter; 0: none, and no forgetting"
    )
    dry_run: bool = _flag(False, "show the plan, the steps and a step's memory; write nothing")
    dry_run_device: str | None = _flag(
        None, "the kind of device a dry run pretends to have, such as cuda; by default this one's"
    )

    def __post_init__(self) -> None:
        for name, reason in REFUSED.items():
            if getattr(self, name, None):
                raise ArgumentError(f"--{name} can't be used: {reason}")
        self._choose_checkpoint()
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ArgumentError(f"--{name} must be at least 1, got {getattr(self, name)}")
        rate = self.learning_rate
        if rate is not None and not rate >= 0:
            raise ArgumentError(f"--learning_rate must not be negative, got {rate}")
        if self.dry_run or not torch.accelerator.is_available():
            self.use_cpu = True
        if self.dry_run and (self.fsdp or self.deepspeed):  # type: ignore[has-type]
            print("note: a dry run simulates one device, which holds the base whole")
            self.fsdp = None
            self.deepspeed = None
        if self.tf32 and not is_torch_tf32_available():  # type: ignore[has-type]
            print("note: --tf32 does nothing on this machine")
            self.tf32 = None
        super().__post_init__()
        if self.fsdp and not dist.is_initialized():
            raise ArgumentError(
                "--fsdp shards the base among several processes; start them, as in torchrun "
                "--nproc_per_node 2 -m disha finetune"
            )
        if self.use_cpu and self.world_size > 1:
            self._start_engine_on_processors()
        if self.early_stopping_patience and not self.metric_for_best_model:
            raise ArgumentError("--early_stopping_patience needs --load_best_model_at_end")
        _require_reporters(self.report_to)

    def _start_engine_on_processors(self) -> None:
        """Let processors shard the base, which accelerate begins on accelerators only."""
        if self.fsdp:
            self.distributed_state.distributed_type = DistributedType.MULTI_GPU
        if self.deepspeed:
            import deepspeed

            # DeepSpeed would compile this kernel, which takes a minute and needs a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

    @property
    def simulated_device(self) -> torch.device:
        """The kind of device that a dry run pretends to have."""
        return torch.device(self.dry_run_device or best_device().type)

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the trainer moves the model: that of a dry run has no values to move."""
        if self.dry_run:
            return False
        return super().place_model_on_device

    def _choose_checkpoint(self) -> None:
        """Let `--resume_from_checkpoint True` mean the last one, as in `Trainer`; check others."""
        chosen: str | None = self.resume_from_checkpoint  # type: ignore[has-type]
        if chosen is None:
            return
        if chosen.lower() in ("true", "false"):
            self.resume = chosen.lower() == "true"
            self.resume_from_checkpoint = None
        elif not Path(chosen, TRAINER_STATE).is_file():
            raise ArgumentError(
                f"--resume_from_checkpoint {chosen} is not a complete checkpoint of a run; "
                "--resume goes on from the last one"
            )


def _require_reporters(names: Sequence[str]) -> None:
    """Raise if a package to report to is not there, before a model is loaded."""
    for callback in get_reporting_integration_callbacks(names):  # type: ignore[no-untyped-call]
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise MissingPackageError(f"--report_to: {error}") from error


Parsed = tuple[AdapterArguments, DataArguments, TrainingArguments]


def parse_flags(words: Sequence[str]) -> Parsed:
    """Return the settings that the words of a command line give, and print what was chosen.

    Help is printed, and exits.
    """
    parser = _parser(shows_all="--help_all" in words)
    given = _read_given(parser, words)
    if given.get("adapter") is not None:
        given["adapter"] = str(find_adapter(given["adapter"]))
    settings = {**given, **_settings_of_adapter(given)}
    kind = "cpu" if given.get("use_cpu") else best_device().type
    if given.get("dry_run") and given.get("dry_run_device"):
        kind = given["dry_run_device"]
    device = read_device(kind)
    choices = choose(device, _plan_for_rate(settings), settings)
    settings |= {name: choice.value for name, choice in choices.items()}
    try:
        adapter, data, training = parser.parse_dict(settings, allow_extra_keys=True)
    except ValueError as error:  # SFTConfig checks its values, and says clearly what is wrong
        raise ArgumentError(str(error)) from error
    if training.process_index == 0:
        print(describe(device, choices))
    return adapter, data, training


def _read_given(parser: _Parser, words: Sequence[str]) -> dict[str, Any]:
    """Return the flags that the words give, and not the defaults of others."""
    _warn_of_repeated_lists(words, parser)
    only_file = _Parser([], add_help=False, allow_abbrev=False)
    only_file.add_argument("--config", nargs="?", const=".")
    found, _ = only_file.parse_known_args(words)
    if found.config is not None:
        words = [*_read_flags(Path(found.config)), *words]
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    flags, unknown = parser.parse_known_args(words, blank)
    if unknown:
        raise ArgumentError(f"there is no flag {unknown[0]}{_hint(unknown[0], parser)}")
    return {name: value for name, value in vars(flags).items() if value is not absent}


def _settings_of_adapter(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the adapter that is trained further sets; flags must not say otherwise."""
    adapter = given.get("adapter")
    if adapter is None:
        return {"method": _choose_method(given)}
    settings = read_settings(adapter)
    wanted = {**given, "method": _choose_method(given, settings["method"])}
    for name, value in settings.items():
        if wanted.get(name, value) != value:
            raise ArgumentError(
                f"{adapter} has {name}={value}, which can't change; leave out --{name}"
            )
    if given.get("base") is None:
        settings["base"], _ = read_noted_base(adapter)
    if given.get("bits", "auto") == "auto":
        settings["bits"] = read_noted_bits(read_notes(adapter))
    return settings


def _choose_method(given: Mapping[str, Any], noted: str | None = None) -> str:
    """Return the method that flags give, in its own or the author's words, or the noted one."""
    if noted is not None and not {"method", "init_weights", "groups"} & given.keys():
        return noted
    plain = "bone" if noted is None else noted.partition("_groups")[0]
    method: str = given.get("method", plain)
    if given.get("init_weights") == "bat":
        method = "bat"
    elif given.get("init_weights") and method not in ("bone", "miss"):
        raise ArgumentError(
            f"--init_weights True means Bone, and the adapter has method={method}; leave one out"
        )
    groups = given.get("groups", "1")
    if groups == "1":
        return method
    if groups != "all" and not re.fullmatch("[1-9][0-9]*", groups):
        raise ArgumentError(f"--groups must be a number from 1, or all; got {groups}")
    if method not in ("bone", "miss"):
        raise ArgumentError(
            f"leave --groups out: only bone takes groups of shards, and the method is {method}"
        )
    return "bone_groups_all" if groups == "all" else f"bone_groups{groups}"


def _plan_for_rate(settings: Mapping[str, Any]) -> disha.Plan | None:
    """Return what a run adapts, if the learning rate depends on it; None if that can't be read."""
    if settings.get("base") is None or settings.get("learning_rate") is not None:
        return None
    names = {field.name for field in fields(AdapterArguments)}
    try:
        adapter = AdapterArguments(**{n: v for n, v in settings.items() if n in names})
        model = make_on_meta(settings["base"])
        return disha.plan_adapters(model, **adapter.settings_for(model))
    except (DishaError, OSError, ValueError, ImportError):
        return None  # loading the base says what is wrong


def _warn_of_repeated_lists(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Warn of a flag with several values that comes twice: as in trl, the last one alone counts."""
    for action in parser._actions:
        named = [word for word in words if word.partition("=")[0] in action.option_strings]
        if action.nargs == "+" and len(named) > 1:
            warnings.warn(
                f"{named[-1]} comes {len(named)} times, and the last one alone counts; to use all "
                "values, give them after one",
                stacklevel=3,
            )


def _hint(word: str, parser: argparse.ArgumentParser) -> str:
    """Return what to do about an unknown flag, as the end of a message."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    if name in OF_OTHERS:
        return f"; use {OF_OTHERS[name]}"
    near = nearest(word, parser._option_string_actions)
    return near if near else "; --help_all shows all flags"


def _parser(shows_all: bool) -> _Parser:
    parser = _Parser(
        [AdapterArguments, DataArguments, TrainingArguments],  # type: ignore[list-item]
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=_Format,
    )
    config_help = "a YAML file of flags; those of the command line win"
    parser.add_argument("--config", nargs="?", const=".", help=config_help)
    parser.add_argument("--help_all", action="help", help="show all flags of SFTConfig too")
    flags = parser._option_string_actions
    for former, name in RENAMED.items():
        flags[f"--{former}"] = flags[f"--{name}"]
        flags[f"--{former.replace('_', '-')}"] = flags[f"--{name}"]
    hidden = set()
    if not shows_all:
        hidden = {setting.name for setting in fields(SFTConfig)} - set(SHOWN)
    for action in parser._actions:
        if action.dest in hidden or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    return parser


class _Parser(HfArgumentParser):
    """Raises where `argparse` would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


class _Format(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each name of a flag once, without its form with dashes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        values = " X"
        if action.nargs == "+":
            values = " ..."
        elif action.nargs in (0, "?"):
            values = ""
        return ", ".join(names) + values


def _read_flags(path: Path) -> Iterator[str]:
    """Give the words of a command line that a YAML file of flags stands for."""
    example = "--config needs a YAML file of flags, as in `r: 64`"
    try:
        flags = yaml.safe_load(read_text(path))
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"{example}; {path} can't be read as YAML: {error}") from error
    if not isinstance(flags, dict):
        state = "is empty" if flags is None else "holds no flags"
        raise ArgumentError(f"{example}; {path} {state}")
    for name, value in flags.items():
        if value in (None, []):
            continue
        yield f"--{name}"
        items = value if isinstance(value, list) else [value]
        for item in items:
            text = json.dumps(item) if isinstance(item, dict) else str(item)
            yield text


def _split_rank_pattern(pair: str) -> tuple[str, int]:
    pattern, sign, r = pair.rpartition("=")
    if not sign or not r.isdecimal():
        raise ArgumentError(f"--rank_pattern needs regex=r, such as v_proj=16, got {pair}")
    return pattern, int(r)
