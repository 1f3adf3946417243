"""``disha evaluate``: held against a slow loop with transformers, and what each flag does."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import disha
from disha.finetune.settings import DataSettings, RowSettings
from tests.cli.model_files import write_rows


@pytest.fixture
def measure(run, models):
    """Run `disha evaluate` on the tiny model with its adapter, or with other flags."""

    def measure_model(*flags, adapter=models / "adapter.safetensors", data=None):
        given = [] if adapter is None else ["--adapter", adapter]
        base = ("--base_model_name_or_path", models / "model", "--max_seq_length", 96)
        return run(
            "evaluate", *base, *given, "--data_path", data or models / "held_out.jsonl", *flags
        )

    return measure_model


def losses(folder, rows, adapter=None):
    """The summed cross-entropy of the responses and their ends, row by row, and their tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        disha.load_adapter(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in rows:
        prompt = f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n"
        answer = tokenizer(row["response"], add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="sum"
        ).item()
        count += len(answer)
    return total, count


def rows_of(models):
    return [json.loads(line) for line in (models / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_loss_and_perplexity_are_those_of_a_slow_loop(measure, models, batch):
    found = measure("--compare", "--json", "--per_device_eval_batch_size", batch).json
    rows = rows_of(models)
    for name, adapter in (("model", models / "adapter.safetensors"), ("base", None)):
        total, count = losses(models / "model", rows, adapter)
        assert found[name]["tokens"] == count
        assert found[name]["loss"] == pytest.approx(total / count, rel=1e-4, abs=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(found[name]["loss"]))
        assert found[name]["exact"] is None
    assert found["rows"] == len(rows)
    assert (found["cut"], found["dropped"], found["bad"]) == (0, 0, 0)
    assert found["base"]["loss"] > found["model"]["loss"] + 0.1


def test_without_an_adapter_the_base_is_measured(measure):
    both = measure("--compare", "--json").json
    alone = measure("--json", adapter=None).json
    assert alone["model"] == both["base"]
    assert alone["base"] is None


def test_merged_it_measures_the_same(measure):
    plain, merged = (measure("--compare", "--json", *m).json for m in ([], ["--merge"]))
    assert merged["model"]["loss"] == pytest.approx(plain["model"]["loss"], abs=1e-4)
    assert merged["base"]["loss"] == plain["base"]["loss"]


def test_exact_answers_are_counted(measure, models, tmp_path):
    rows = rows_of(models)
    rows[0]["response"] = "hello world"  # which it does not say
    rows[1]["response"] += "  "  # white space around does not count
    rows[2]["response"] = rows[2]["response"].upper()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = measure("--exact_match", "--compare", "--json", data=data).json
    assert found["model"]["exact"] == len(rows) - 2
    assert found["base"]["exact"] == 0
    short = measure("--exact_match", "--max_new_tokens", 2, "--json", data=data).json
    assert short["model"]["exact"] == 0


def test_what_is_printed_is_a_table_and_what_became_of_the_rows(measure):
    done = measure("--exact_match", "--compare")
    assert (done.code, done.err) == (0, "")
    head, base, adapted, last = done.out.splitlines()
    found = measure("--exact_match", "--compare", "--json").json
    assert head.split() == ["loss", "perplexity", "exact"]
    assert base.split("  ")[0] == "base model"
    assert adapted.startswith("with the adapter  ")
    assert f"{found['model']['loss']:.4f}" in adapted
    assert adapted.endswith("10 of 10")
    assert last == f"10 rows, {found['model']['tokens']} tokens to predict"
    assert measure(adapter=None).out.splitlines()[1].startswith("model")


def test_rows_that_are_not_used_are_counted(measure, tmp_path, models):
    rows = rows_of(models)[:3]
    long = [
        {"query": "say " * 60, "response": "hello"},
        {"query": "a", "response": "hello " * 90},
        {"query": "a"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, *long])
    found = measure("--json", "--skip_bad_rows", data=data).json
    assert [found[name] for name in ("rows", "cut", "dropped", "bad")] == [4, 1, 1, 1]
    said = measure("--skip_bad_rows", data=data).out.splitlines()[-1]
    assert "4 rows, " in said
    assert "; 1 of them cut to fit; 1 left out as too long; 1 left out as unusable" in said
    done = measure(data=data)
    assert done.code == 2
    assert f"{data}, line 6 has no field 'response'" in done.complaint


def test_a_split_and_other_fields(measure, tmp_path, models):
    rows = [{"q": r["query"], "a": r["response"]} for r in rows_of(models)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = measure(
        "--json", "--dataset_field", "q", "a", "--dataset_split", "train[2:6]", data=data
    )
    assert found.json["rows"] == 4


def test_a_text_is_measured_as_a_whole(measure, models):
    found = measure("--json", "--dataset_field", "query").json
    count = sum(
        len(AutoTokenizer.from_pretrained(models / "model")(row["query"]).input_ids)
        for row in rows_of(models)
    )
    assert found["model"]["tokens"] == count  # the end token for the begin token


def test_the_template_is_the_adapters(measure, models, tmp_path):
    from disha.finetune.models.checkpoint import open_model

    model = open_model(models / "model").load_model(torch.float32)
    disha.load_adapter(model, models / "adapter.safetensors")
    other = tmp_path / "other.safetensors"
    disha.save_adapter(model, other, metadata={"template": "{query}?"})
    noted = measure("--json", adapter=other).json["model"]["loss"]
    given = measure("--json", "--template", "{query}?").json["model"]["loss"]
    assert noted == given
    assert noted != measure("--json").json["model"]["loss"]


def test_progress_is_told_of_batches_and_answers(measure, monkeypatch):
    seen = []

    def watch(items, total, what):
        found = list(items)
        seen.append((what, total, len(found)))
        yield from found

    monkeypatch.setattr("disha.cli.evaluate.with_progress", watch)
    assert measure("--exact_match", "--per_device_eval_batch_size", 4).code == 0
    assert seen == [("measuring", 3, 3), ("answering", 3, 3)]


def test_each_scale_is_measured_on_both_rows_and_the_best_is_named(measure, models, tmp_path):
    others = [{"query": row["query"], "response": "other"} for row in rows_of(models)[:4]]
    retain = write_rows(tmp_path / "other.jsonl", others)
    flags = ("--scales", "0,0.5,1", "--retain", retain, "--plot", tmp_path / "scales.png")
    found = measure(*flags, "--json").json
    assert [one["scale"] for one in found["scales"]] == [0, 0.5, 1]
    held_out = rows_of(models)
    for scale, adapter in ((0, None), (2, models / "adapter.safetensors")):
        for name, rows in (("loss", held_out), ("retained", others)):
            total, count = losses(models / "model", rows, adapter)
            assert found["scales"][scale][name] == pytest.approx(total / count, rel=1e-4, abs=1e-5)
    assert found["scales"][2]["loss"] == found["model"]["loss"]
    sums = {one["scale"]: one["loss"] + one["retained"] for one in found["scales"]}
    assert found["best_scale"] == min(sums, key=sums.get)
    assert (tmp_path / "scales.png").read_bytes().startswith(b"\x89PNG")

    lines = measure(*flags).out.splitlines()
    assert lines[2].split("  ")[0] == "scale"
    assert lines[4].split() == [
        "0.5",
        *(f"{found['scales'][1][n]:.4f}" for n in ("loss", "retained")),
    ]
    assert lines[6] == f"best scale: {found['best_scale']:g}, with the lowest sum of both losses"

    failed = measure("--scales", "0,1", "--plot", tmp_path)
    assert failed.code == 2
    assert "best scale" in failed.out


def test_lack_of_memory_is_one_line(measure, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("disha.finetune.evaluating.mean_loss", fail)
    done = measure()
    assert done.code == 1
    assert "not enough memory on the GPU; lower --per_device_eval_batch_size" in done.complaint


def test_scales_are_parts_of_the_adapters_own(measure, models, tmp_path):
    from disha.finetune.models.checkpoint import open_model

    model = open_model(models / "model").load_model(torch.float32)
    disha.load_adapter(model, models / "adapter.safetensors")
    disha.set_adapter_scale(model, 0.5)
    half = tmp_path / "half.safetensors"
    disha.save_adapter(model, half)
    found = measure("--scales", "1,2", "--json", adapter=half).json
    whole = measure("--scales", "0.5,1", "--json").json
    pairs = zip(found["scales"], whole["scales"], strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], abs=1e-5) for one, other in pairs)
    assert found["best_scale"] == 2
    assert found["scales"][0]["loss"] == found["model"]["loss"]


def test_what_scales_need_is_found_out_before_anything_is_measured(
    measure, models, tmp_path, monkeypatch
):
    from disha.finetune.models.checkpoint import open_model

    monkeypatch.setattr("disha.cli.evaluate.with_progress", None)  # measuring would call it
    unfit = write_rows(tmp_path / "unfit.jsonl", [{"query": "a"}])
    done = measure("--scales", "0,1", "--retain", unfit)
    assert done.code == 2
    assert "no field 'response'" in done.complaint

    model = open_model(models / "model").load_model(torch.float32)
    disha.load_adapter(model, models / "adapter.safetensors")
    block = next(module for module in model.modules() if hasattr(module, "disha")).disha["default"]
    block.set_scale(0.5)
    mixed = tmp_path / "mixed.safetensors"
    disha.save_adapter(model, mixed)
    done = measure("--scales", "0,1", adapter=mixed)
    assert done.code == 2
    assert "its layers have 2 different scales; leave --scales out" in done.complaint


# --- what can't be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--max_new_tokens", 0], "--max_new_tokens must be at least 1"),
        (["--per_device_eval_batch_size", 0], "--per_device_eval_batch_size must be at least 1"),
        (["--exact_match", "--dataset_field", "query"], "must name two fields"),
        (["--data_path", "absent.jsonl"], "--data_path absent.jsonl does not exist"),
        (["--dataset_split", "test"], "no split 'test'"),
        (["--dataset_split", "train[5:2]"], "train[5:2]"),
        (["--dataset_field", "query", "answer"], "no field 'answer'"),
        (["--max_seq_length", 1000], "--max_seq_length must be at most 128"),
        (["--max_seq_length", 5], "none of the 10 rows can be used"),
        (["--template", "no query"], "--template must be auto, chat, a text"),
        (["--adapter", "absent.safetensors"], "absent.safetensors"),
        (["--scales", "0,half"], "--scales must be numbers with commas, such as 0,0.5,1, got"),
        (["--scales", "0,inf"], "--scales must be numbers"),
        (["--scales", "0,1", "--merge"], "leave --merge out"),
        (["--retain", "rows.jsonl"], "--retain is for the losses at several scales"),
        (["--plot", "scales.png"], "--plot is for the losses at several scales"),
        (["--scales", "0,1", "--retain", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(measure, flags, complaint):
    done = measure(*flags)
    assert done.code == 2
    assert complaint in done.complaint


OF_TRAINING = {one.name for one in dataclasses.fields(DataSettings)} - {
    one.name for one in dataclasses.fields(RowSettings)
}


def test_the_help_lists_no_flag_that_only_training_follows(run):
    listed = set(re.findall(r"^ +--(\w+)", run("evaluate", "--help").out, re.MULTILINE))
    assert {"packing", "eval_path", "data_weights"} <= OF_TRAINING
    assert listed & OF_TRAINING == set()
    assert {"data", "dataset_split", "streaming", "scales", "bits"} <= listed


@pytest.mark.parametrize("name", sorted(OF_TRAINING))
def test_a_flag_that_only_training_follows_is_unknown(measure, name):
    done = measure(f"--{name}", 1)
    assert done.code == 2
    assert f"evaluate has no flag --{name}; " in done.complaint
    near = {"eval_path": "--data", "eval_split": "--dataset_split"}.get(name)
    assert (f"did you mean {near}?" if near else "--help shows all") in done.complaint
    assert ("did you mean" in done.complaint) == (near is not None)


@pytest.mark.parametrize("flags", [["--compare"], ["--merge"], ["--scales", "0,1"]])
def test_what_needs_an_adapter_says_so(measure, flags):
    done = measure(*flags, adapter=None)
    assert done.code == 2
    assert f"{flags[0]} needs an adapter" in done.complaint


def test_rows_must_be_given(run, models):
    done = run("evaluate", "--base_model_name_or_path", models / "model")
    assert done.code == 2
    assert "--data_path rows.jsonl is missing" in done.complaint
