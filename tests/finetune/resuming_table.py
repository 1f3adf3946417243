"""What may change between a stop and `--resume`: the table that the tests try and the docs show.

`python -m tests.finetune.resuming_table` prints it as Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import disha
from disha.finetune.hashing import file_hash
from disha.finetune.models.checkpoint import open_model
from tests.finetune import factories
from tests.finetune.command_line import write_rows

STEPS, DONE = 5, 3

USUAL: Mapping[str, Any] = {
    "bone_r": 4,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": DONE,
    "eval_path": "{folder}/held-out.jsonl",
}
"""Flags of both runs, unless a case says otherwise."""

SAME, ROUNDED, REFUSED = "continues, same bits", "continues, up to rounding", "refused"


@dataclass(frozen=True)
class Case:
    """A change between two runs.

    Args:
        flags: what the second command has instead; `{folder}` is the folder of all files.
        always: what both commands have instead of the usual.
        do: changes files.
        says: what the command complains of, where it refuses.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    do: Callable[[Path, pytest.MonkeyPatch], None] = lambda folder, patch: None
    says: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        what: the change, in words.
        outcome: what `--resume` does.
        cases: changes of this kind.
    """

    what: str
    outcome: str
    cases: Mapping[str, Case]


# --- changes of files ----------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def in_data(change: Callable[[Rows], Rows], name: str = "rows.jsonl"):
    """Change the rows of a file."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        write_rows(folder / name, change(rows))

    return do


def all_but_three_replaced(rows: Rows) -> Rows:
    kept = {0, len(rows) // 2, len(rows) - 1}
    return [row if n in kept else {**row, "response": f"other {n}"} for n, row in enumerate(rows)]


def one_replaced(rows: Rows) -> Rows:
    return [*rows[:7], {**rows[7], "response": "other"}, *rows[8:]]


def with_other_names(rows: Rows) -> Rows:
    return [{"asked": row["query"], "answered": row["response"]} for row in rows]


def renamed(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("model", "rows.jsonl", "held-out.jsonl", "out"):
        (folder / name).rename(folder / f"other-{name}")


def in_json(name: str, change: Callable[[Any], None]):
    """Change a JSON file of the base model."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / "model" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return do


def in_weight(name: str):
    """Change one value of the base model."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / "model" / "model.safetensors"
        weights = load_file(path)
        weights[name].view(-1)[-1] += 0.5
        save_file(weights, path, {"format": "pt"})

    return do


def in_two_files(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Store the base model in two files instead of one."""
    path = folder / "model" / "model.safetensors"
    weights = sorted(load_file(path).items())
    places = {}
    for number in (1, 2):
        part = dict(weights[number - 1 :: 2])
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(part, path.with_name(name), {"format": "pt"})
        places.update(dict.fromkeys(part, name))
    path.unlink()
    index = {"metadata": {}, "weight_map": places}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def another_start(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Change one value of the adapter that training started from."""
    path = folder / "start.safetensors"
    model = open_model(folder / "model").load_model(torch.float32)
    disha.load_adapter(model, path)
    with torch.no_grad():
        next(disha.adapter_parameters(model)).view(-1)[0] += 1
    disha.save_adapter(model, path)


def another_seed(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(factories, "SEED", 4)


def in_setup(change: Callable[[dict[str, Any], list[str]], None]):
    """Change what the checkpoint holds of the settings, as another version would write it."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        checkpoint = folder / "out" / f"checkpoint-{DONE}"
        state = torch.load(checkpoint / "training.pt", weights_only=True)
        changed = list(state["setup"]["changed"])
        change(state["setup"]["settings"], changed)
        state["setup"]["changed"] = changed
        torch.save(state, checkpoint / "training.pt")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["training.pt"] = file_hash(checkpoint / "training.pt")
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return do


def without(name: str):
    def change(settings: dict[str, Any], changed: list[str]) -> None:
        del settings[name]
        changed[:] = [other for other in changed if other != name]

    return in_setup(change)


def with_setting(name: str, value: Any, *, changed: bool):
    def change(settings: dict[str, Any], names: list[str]) -> None:
        settings[name] = value
        names.extend([name] * changed)

    return in_setup(change)


# --- the table -----------------------------------------------------------------------------------


def refused(name: str, value: Any, **others: Any) -> Case:
    """A flag that must be as it was."""
    return Case({name: value, **others}, says=f"was saved with --{name} .*use the same settings")


BY_FRACTION = {"eval_path": None, "eval_fraction": 0.2}
BY_FUNCTION = {"base_model_name_or_path": None, "model": "tests.finetune.factories:gpt2"}
WEIGHTED = {"data_path": ["{folder}/rows.jsonl", "{folder}/more.jsonl"], "data_weights": [1, 3]}
BEST = {"eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.05}
GOING_ON = {"adapter": "{folder}/start.safetensors"}
CONSTANT = {"lr_scheduler_type": "constant"}
BY_EPOCHS = {"max_steps": None, "num_train_epochs": 0.5}
ROWS_DIFFER = "was saved with another set of rows: "
HELD_OUT_DIFFER = "was saved with another set of held-out rows: "
BASE_DIFFERS = "was saved with another base model: "

TABLE = [
    Row(
        "nothing",
        SAME,
        {
            "nothing": Case(),
            "function": Case(always=BY_FUNCTION),
            "going on": Case(always=GOING_ON),
            "best": Case(always=BEST),
            "weights": Case(always=WEIGHTED),
        },
    ),
    Row(
        "files and folders have moved: `--output_dir`, `--base_model_name_or_path`, "
        "`--adapter`, `--tokenizer`, `--data_path`, `--eval_path`, `--config`",
        SAME,
        {
            "renamed": Case(
                {
                    "base_model_name_or_path": "{folder}/other-model",
                    "data_path": "{folder}/other-rows.jsonl",
                    "eval_path": "{folder}/other-held-out.jsonl",
                    "output_dir": "{folder}/other-out",
                },
                do=renamed,
            ),
            "renamed start": Case(
                {"adapter": "{folder}/other.safetensors"},
                GOING_ON,
                do=lambda folder, patch: (folder / "start.safetensors").rename(
                    folder / "other.safetensors"
                ),
            ),
            "tokenizer": Case({"tokenizer": "{folder}/model"}),
            "config": Case(
                {"config": "{folder}/flags.yaml", "bone_r": None},
                do=lambda folder, patch: write(folder / "flags.yaml", "bone_r: 4\n"),
            ),
        },
    ),
    Row(
        "the same rows or weights, named or stored in another way: `--dataset_split`, "
        "`--dataset_field`, `--template`, `--eval_split`, `--skip_bad_rows`, weights in one or in "
        "several files",
        SAME,
        {
            "split": Case({"dataset_split": "train[:50%]+train[50%:]"}),
            "held-out split": Case({"eval_split": "train[:100%]"}),
            "template": Case(
                {"template": "<|im_start|>user\\n{query}<|im_end|>\\n<|im_start|>assistant\\n"}
            ),
            "skip": Case({"skip_bad_rows": True}),
            "fields": Case(
                {"dataset_field": ["asked", "answered"]},
                do=lambda folder, patch: [
                    in_data(with_other_names, name)(folder, patch)
                    for name in ("rows.jsonl", "held-out.jsonl")
                ],
            ),
            "shards": Case(do=in_two_files),
            "remark": Case(do=in_json("config.json", lambda it: it.update(_name="other"))),
        },
    ),
    Row(
        "what is measured, shown or saved: `--eval_steps` (without the flags for the best step, "
        "see below), `--logging_steps`, `--save_strategy`, "
        "`--save_steps`, `--save_total_limit`, `--report_to`, `--samples`, `--merge`, `--verify`, "
        "`--note_base`, `--debug`",
        SAME,
        {
            "output": Case(
                {
                    "eval_steps": 1,
                    "logging_steps": 5,
                    "save_strategy": "epoch",
                    "save_steps": 4,
                    "save_total_limit": 1,
                    "report_to": "tensorboard",
                    "samples": 3,
                    "merge": True,
                    "verify": True,
                    "note_base": False,
                    "debug": True,
                }
            )
        },
    ),
    Row(
        "`--streaming`, `--dataloader_num_workers`",
        SAME,
        {"workers": Case({"streaming": True, "dataloader_num_workers": 1})},
    ),
    Row(
        "`--max_steps`, `--num_train_epochs`, `--learning_rate`, `--lr_scheduler_type`, "
        "`--warmup_ratio`, if the steps already done keep their learning rates. An example is more "
        "steps at a constant rate",
        SAME,
        {
            "longer": Case({"max_steps": STEPS + 2}, CONSTANT),
            "more epochs": Case({"num_train_epochs": 0.6}, {**CONSTANT, **BY_EPOCHS}),
            "another decay": Case({"lr_scheduler_type": "linear"}, {"warmup_ratio": 0.9}),
        },
    ),
    Row(
        "the version of `disha`, if all settings that only one of the versions has are at their "
        "defaults",
        SAME,
        {
            "newer": Case(do=without("packing")),
            "older": Case(do=with_setting("novel", 3, changed=False)),
        },
    ),
    Row(
        "`--strategy`, `--gradient_checkpointing`, `--compile`",
        ROUNDED,
        {
            "strategy": Case({"strategy": "fsdp"}),
            "recomputing": Case({"gradient_checkpointing": True}),
            "compiling": Case({"compile": True}),
        },
    ),
    Row(
        "any row to train on, or their order; also by another split, field, template or tokenizer, "
        "or by `--eval_fraction`",
        REFUSED,
        {
            "most rows": Case(do=in_data(all_but_three_replaced), says=ROWS_DIFFER),
            "one row": Case(do=in_data(one_replaced), says=ROWS_DIFFER),
            "fewer": Case(do=in_data(lambda rows: rows[:-1]), says=ROWS_DIFFER),
            "more": Case(do=in_data(lambda rows: [*rows, rows[0]]), says=ROWS_DIFFER),
            "order": Case(do=in_data(lambda rows: rows[::-1]), says=ROWS_DIFFER),
            "split": Case(
                {"dataset_split": "train[:30]"},
                says=rf"{ROWS_DIFFER}.*--dataset_split train\[:30\] instead of "
                "--dataset_split train; use the same set of rows to resume",
            ),
            "field": Case(
                {"dataset_field": ["original_question", "response"]},
                says=f"{ROWS_DIFFER}.*dataset_field",
            ),
            "template": Case({"template": "{query}:"}, says=f"{ROWS_DIFFER}.*template"),
            "fraction": Case(
                {"eval_fraction": 0.3}, BY_FRACTION, says=f"{ROWS_DIFFER}.*eval_fraction"
            ),
            "tokenizer": Case(
                do=in_json("tokenizer.json", lambda it: it["model"]["merges"].pop(0)),
                says=ROWS_DIFFER,
            ),
        },
    ),
    Row(
        "any held-out row",
        REFUSED,
        {
            "row": Case(do=in_data(one_replaced, "held-out.jsonl"), says=HELD_OUT_DIFFER),
            "split": Case({"eval_split": "train[:7]"}, says=f"{HELD_OUT_DIFFER}.*eval_split"),
        },
    ),
    Row(
        "the base model: any weight, or a constant such as the epsilon of a norm",
        REFUSED,
        {
            "embedding": Case(do=in_weight("model.embed_tokens.weight"), says=BASE_DIFFERS),
            "adapted": Case(
                do=in_weight("model.layers.1.mlp.up_proj.weight"),
                says=BASE_DIFFERS,
            ),
            "constant": Case(
                do=in_json("config.json", lambda it: it.update(rms_norm_eps=1e-3)),
                says=BASE_DIFFERS,
            ),
            "function": Case(always=BY_FUNCTION, do=another_seed, says=BASE_DIFFERS),
            "model": refused("model", BY_FUNCTION["model"], base_model_name_or_path=None),
        },
    ),
    Row(
        "which step is the best, and when to stop early: `--load_best_model_at_end`, "
        "`--early_stopping_patience`, `--metric_for_best_model`, and `--eval_steps` with one of "
        "these",
        REFUSED,
        {
            "best": refused("load_best_model_at_end", True, eval_steps=1),
            "no best": Case({"load_best_model_at_end": False}, BEST, says="use the same settings"),
            "patience": refused("early_stopping_patience", 9, eval_steps=1),
            "metric": Case(
                {"metric_for_best_model": "perplexity"}, BEST, says="with --metric_for_best_model "
            ),
            "measurements": Case({"eval_steps": 2}, BEST, says="with --eval_steps 1, but this "),
        },
    ),
    Row(
        "the adapter to start from",
        REFUSED,
        {
            "value": Case(
                always=GOING_ON, do=another_start, says="saved with another adapter to start from"
            ),
            "none before": Case(GOING_ON, says="was saved with --target None, but "),
            "none now": Case({"adapter": None}, GOING_ON, says="but this run has --target None"),
        },
    ),
    Row(
        "other settings that affect what is learned: `--model`, `--bits`, `--bone_r`, "
        "`--init_weights`, `--method`, `--bone_r_out`, `--target`, `--exclude`, `--rank_pattern`, "
        "`--also_train`, `--adapter_dropout`, "
        "`--max_seq_length`, `--packing`, `--group_by_length`, "
        "`--per_device_train_batch_size`, `--data_weights`, "
        "`--gradient_accumulation_steps`, `--optimizer`, `--weight_decay`, `--max_grad_norm`, "
        "`--seed`, `--bf16`, `--tf32`",
        REFUSED,
        {
            "data_weights": Case(
                {"data_weights": [1, 2]}, WEIGHTED, says="data_weights 1.0 3.0, but this run has "
            ),
        }
        | {
            name: refused(name, value)
            for name, value in {
                "bits": "bf16",
                "bone_r": 8,
                "init_weights": "bat",
                "method": "bat",
                "bone_r_out": 2,
                "target": "q_proj$",
                "exclude": "q_proj$",
                "rank_pattern": "v_proj=2",
                "also_train": "norm",
                "adapter_dropout": 0.1,
                "max_seq_length": 64,
                "packing": True,
                "group_by_length": False,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "optimizer": "sgd",
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "seed": 1,
                "bf16": True,
                "tf32": True,
            }.items()
        },
    ),
    Row(
        "`--max_steps`, `--num_train_epochs`, `--learning_rate`, `--lr_scheduler_type`, "
        "`--warmup_ratio`, if the steps already done would have had other learning rates; fewer "
        "steps than are done",
        REFUSED,
        {
            "steps": refused("max_steps", 7),
            "epochs": Case(
                {"num_train_epochs": 1}, BY_EPOCHS, says="saved with --num_train_epochs"
            ),
            "rate": refused("learning_rate", 1e-3),
            "schedule": refused("lr_scheduler_type", "linear"),
            "warm-up": refused("warmup_ratio", 0.5),
            "fewer": Case(
                {"max_steps": 2}, CONSTANT, says="was saved after step 3, but this run has 2 steps"
            ),
        },
    ),
    Row(
        "the version of `disha`, if a setting that only one version has is not at its default, or "
        "if a default has changed",
        REFUSED,
        {
            "newer": Case(
                always={"adapter_dropout": 0.1},
                do=without("adapter_dropout"),
                says="with no --adapter_dropout, but this run has --adapter_dropout 0.1",
            ),
            "older": Case(
                do=with_setting("novel", 3, changed=True),
                says="with --novel 3, but this run has no --novel",
            ),
            "default": Case(
                do=with_setting("weight_decay", 0.01, changed=False),
                says="with --weight_decay 0.01, but this run has --weight_decay 0.0",
            ),
        },
    ),
    Row(
        "`--demo`, `--overwrite_output_dir`",
        REFUSED,
        {
            "demo": Case({"demo": True}, says="does not go with --demo"),
            "overwriting": Case({"overwrite_output_dir": True}, says="--resume continues from"),
        },
    ),
]

PROCESSES = Row(
    "the number of processes; `--gradient_accumulation_steps` stays, or changes so that a step has "
    "as many batches as before",
    ROUNDED,
    {},
)
"""Tried by `test_several_processes.py`."""


def write(path: Path, text: str) -> None:
    path.write_text(text)


def markdown() -> str:
    """The table as the docs show it."""
    rows = [*TABLE, PROCESSES]
    lines = [
        f"| {row.what} | {row.outcome} |"
        for outcome in (SAME, ROUNDED, REFUSED)
        for row in rows
        if row.outcome == outcome
    ]
    return "\n".join(["| what changes | `--resume` |", "|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
