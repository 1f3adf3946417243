"""Whole runs of `disha finetune`, and what they leave behind."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack

import pytest
import torch
from PIL import Image

import disha
from disha.cli import main
from disha.finetune import command
from disha.finetune.answering import TEMPLATE_KEY
from disha.finetune.data.dataset import split_held_out
from disha.finetune.data.rows import Row, Rows
from disha.finetune.folder_lock import LOCK, FolderLock
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.text.from_gguf import tokenizer_from_gguf
from disha.finetune.text.templates import CHATML
from disha.finetune.training.objectives import Objective
from disha.finetune.verification import Tolerance, Verification
from tests.finetune import tiny_checkpoints, tiny_gguf
from tests.finetune.command_line import (
    FILES,
    ROWS,
    adapter_of,
    after_step,
    arguments,
    losses_of,
    metrics_of,
    report_of,
    timeless,
    write_rows,
)
from tests.finetune.tiny_checkpoints import FAMILIES
from tests.fuzzing.faults import CODES, Faults
from tests.processes import environment

# --- one whole run, through a process of its own as a user starts it ------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_path):
    folder = tmp_path_factory.mktemp("run")
    data, output = write_rows(folder / "rows.jsonl"), folder / "new" / "out"
    words = arguments(tiny_path, data, output, eval_fraction=0.25, eval_steps=4, verify=True)
    done = subprocess.run(
        [sys.executable, "-m", "disha", *words],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output, data, done.stdout


def test_a_run_writes_its_files_and_no_others(finished):
    output, _, _ = finished
    assert {path.name for path in output.iterdir()} == FILES


def test_metrics_have_a_line_per_step(finished):
    lines = metrics_of(finished[0])
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in lines[1:])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 6]


def test_the_held_out_loss_falls(finished):
    loss = report_of(finished[0])["loss"]
    assert loss["measured_on"] == "held-out"
    assert loss["after"] < loss["before"] - 0.1
    assert loss["by_step"].keys() == {"0", "4", "6"}


def test_the_fresh_process_agrees(finished):
    verified = report_of(finished[0])["verification"]
    assert verified["agrees"]
    assert verified["loaded_difference"] < 1e-5
    assert verified["merged_difference"] < 1e-4


def test_the_report_says_what_was_done(finished):
    output, data, _ = finished
    report = report_of(output)
    assert report["settings"]["data_path"] == [str(data)]
    assert report["data"]["training"]["rows"] == 30
    assert report["data"]["held_out"]["rows"] == 10
    assert report["training"]["steps"] == 6
    assert report["training"]["tokens_per_second"] > 0
    assert report["training"]["resumed_from"] is None
    assert report["peak_memory_bytes"] > 50 * 2**20
    assert report["versions"]["disha"] == disha.__version__
    assert report["parameters"]["trainable"] == 8 * 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)


def test_the_adapter_file_alone_gives_the_loss_after_training(finished, tiny_path):
    output, _, _ = finished
    checkpoint = GGUFCheckpoint(tiny_path)
    tokenizer = tokenizer_from_gguf(checkpoint.fields, tiny_path)
    model = checkpoint.load_model(torch.float32)
    disha.load_adapter(model, output / "adapter.safetensors")
    rows = Rows([[Row(dict(row), "") for row in ROWS]])
    total = count = 0
    for row in split_held_out(rows, 0.25, seed=0).held_out:
        prompt = CHATML.prompt(row["query"], tokenizer)
        answer = [*tokenizer.encode(row["response"], special=False), tokenizer.end]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
        for place, token in enumerate(answer, start=len(prompt)):
            total, count = total - logits[place - 1, token].item(), count + 1
    assert total / count == pytest.approx(report_of(output)["loss"]["after"], abs=1e-5)


def test_the_adapter_file_notes_base_model_and_template(finished, tiny_path):
    metadata = disha.inspect_adapter(finished[0] / "adapter.safetensors").metadata
    assert metadata["base_model"] == report_of(finished[0])["model"]
    assert metadata[TEMPLATE_KEY] == CHATML.setting


def test_plots_and_samples_can_be_looked_at(finished):
    output, _, _ = finished
    for name in ("loss.png", "learning_rate.png"):
        assert Image.open(output / name).width >= 800
    samples = (output / "samples.md").read_text()
    assert samples.count("**Reference**") == 3
    assert "held-out" in samples
    first = report_of(output)["samples"][0]
    assert first["query"] in samples
    assert first["before"] != first["after"]


def test_what_is_printed_sums_up(finished):
    output, _, printed = finished
    loss = report_of(output)["loss"]
    assert f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f}" in printed
    assert "30 rows to train on" in printed
    assert "step 6/6: loss" in printed
    assert "tokens/s" in printed
    assert str(output) in printed


@pytest.mark.parametrize(
    ("words", "emulates", "said"),
    [
        (["--bits", "bf16"], True, True),
        (["--bits", "fp32", "--bf16"], True, True),
        (["--bits", "fp32"], True, False),
        (["--bits", "bf16", "--bf16"], False, False),
    ],
)
def test_a_processor_without_bfloat16_is_spoken_of(
    tmp_path, tiny_path, monkeypatch, capsys, words, emulates, said
):
    monkeypatch.setattr(command, "emulates_bf16", lambda device: emulates)
    data = write_rows(tmp_path / "rows.jsonl")
    assert main([*arguments(tiny_path, data, tmp_path / "out", dry_run=True), *words]) == 0
    assert ("no instructions for bfloat16" in capsys.readouterr().out) is said


# --- upstream's command ---------------------------------------------------------------------------

UPSTREAMS = """
    --base_model_name_or_path {model}
    --output_dir {output}
    --bone_r 64
    --init_weights {init_weights}
    --bits {bits}
    --data_path {data}
    --dataset_split train[:100000]
    --dataset_field query response
    --bf16 True
    --num_train_epochs 1
    --per_device_train_batch_size 2
    --gradient_accumulation_steps 8
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 1
    --logging_steps 1
    --learning_rate 2e-5
    --weight_decay 0.
    --warmup_ratio 0.03
    --tf32 True
    --report_to none
"""
"""As upstream's README has it."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama 2 that takes as long texts as the big one."""
    folder = tmp_path_factory.mktemp("llama") / "Llama-2-7b-hf"
    return tiny_checkpoints.write_folder(folder, "llama2", max_position_embeddings=4096)


@pytest.mark.parametrize("init_weights", ["True", "bat"])
@pytest.mark.parametrize("bits", ["bf16", "fp32", "8", "4"])
def test_upstreams_example_runs(tmp_path, llama, bits, init_weights):
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "output"
    places = {"model": llama, "output": output, "data": data}
    words = UPSTREAMS.format(bits=bits, init_weights=init_weights, **places).split()
    assert main(["finetune", *words]) == 0
    report = report_of(output)
    assert report["training"]["steps"] == 3, "40 rows, 16 a step"
    assert report["data"]["training"]["rows"] == 40
    assert report["loss"]["after"] < report["loss"]["before"]
    assert losses_of(output)[0] == pytest.approx(report["loss"]["before"], abs=0.5)
    config = disha.inspect_adapter(output / "adapter.safetensors").config
    assert (config.method, config.r) == ("bat" if init_weights == "bat" else "bone", 64)
    assert {path.name for path in output.iterdir()} == FILES


def test_its_learning_rates_are_upstreams(tmp_path, llama):
    """A cosine after a warm-up, as of transformers' trainer, which starts at its second rate."""
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "output"
    places = {"model": llama, "output": output, "data": data}
    words = UPSTREAMS.format(bits="fp32", init_weights="True", **places).split()
    assert main(["finetune", *words]) == 0
    rates = [line["learning_rate"] for line in metrics_of(output) if "loss" in line]
    cosine = [2e-5 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 1 / 2)]
    assert rates == pytest.approx([1e-5, *cosine])


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(finetune, tiny_folder, family):
    report = finetune.good(base_model_name_or_path=tiny_folder(family))
    assert report["model"] == tiny_folder(family).name
    assert report["loss"]["after"] < report["loss"]["before"] - 0.05


def test_bat_in_bfloat16_without_held_out_rows(finetune):
    report = finetune.good(
        "--verify", init_weights="bat", bits="bf16", max_steps=3, gradient_accumulation_steps=2
    )
    assert report["loss"]["measured_on"] == "first training rows'"
    assert report["loss"]["after"] < report["loss"]["before"]
    assert report["verification"]["agrees"]
    config = disha.inspect_adapter(finetune.output / "adapter.safetensors").config
    assert config.method == "bat"


def test_a_quantised_model_is_verified(finetune, tiny_folder):
    report = finetune.good(
        "--verify", base_model_name_or_path=tiny_folder("llama3"), bits="4", max_steps=3
    )
    assert report["verification"]["agrees"]


def test_a_tied_head_can_be_the_target(finetune, tmp_path):
    model = tiny_gguf.write_gguf(tmp_path / "tied.gguf", tiny_gguf.random_state(tied=True))
    report = finetune.good(base_model_name_or_path=model, target="lm_head", max_steps=2)
    assert report["parameters"]["trainable"] == 8 * len(tiny_gguf.TOKENS)


def test_all_linear_layers_can_be_the_target(finetune):
    report = finetune.good(target="all-linear", max_steps=2)
    layers = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert report["parameters"]["trainable"] == 8 * (layers + len(tiny_gguf.TOKENS))


# --- ways to train --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_path):
    """A run that others are held against."""
    folder = tmp_path_factory.mktemp("plain")
    data = write_rows(folder / "rows.jsonl")
    assert main(arguments(tiny_path, data, folder / "out")) == 0
    return folder / "out"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streaming": True, "dataloader_num_workers": 2},
        {"save_strategy": "steps", "save_steps": 2},
        {"report_to": "tensorboard", "logging_steps": 3},
    ],
    ids=lambda changes: " ".join(changes) or "again",
)
def test_what_changes_nothing_of_the_adapter(finetune, plain, changes):
    finetune.good(**changes)
    assert losses_of(finetune.output) == losses_of(plain)
    assert adapter_of(finetune.output) == adapter_of(plain)


def test_gradient_checkpointing_changes_nothing_but_roundings(finetune, plain):
    finetune.good("--gradient_checkpointing")
    assert losses_of(finetune.output) == pytest.approx(losses_of(plain), abs=1e-5)


def test_accumulated_batches_are_one_large_batch(finetune):
    """All rows in each step, so that it does not matter which share a batch."""
    finetune.good(max_steps=3, per_device_train_batch_size=40)
    expected = losses_of(finetune.output)
    finetune.good(
        "--overwrite_output_dir",
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=5,
    )
    assert losses_of(finetune.output) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"adapter_dropout": 0.3},
        {"bone_r_out": 16},
        {"also_train": "norm"},
        {"lr_scheduler_type": "linear"},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"bf16": True},
        {"packing": True},
        {"init_weights": "bat"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_changes_the_adapter(finetune, plain, changes):
    report = finetune.good(**changes)
    assert report["loss"]["after"] < report["loss"]["before"]
    assert adapter_of(finetune.output) != adapter_of(plain)


def test_packed_rows_are_fewer(finetune):
    report = finetune.good(
        "--packing", max_steps=None, num_train_epochs=1, per_device_train_batch_size=1
    )
    assert report["data"]["training"]["rows"] == 40
    assert 40 / 4 < report["training"]["steps"] < 40


def test_a_tile_has_fewer_parameters(finetune):
    report = finetune.good(bone_r_out=16, max_steps=1)
    assert report["parameters"]["trainable"] == 2 * 7 * 8 * 16


def test_what_is_trained_besides_is_in_the_file(finetune, tiny_model):
    finetune.good(also_train=r"layers\.0\..*layernorm", max_steps=2)
    before = tiny_model.model.layers[0].input_layernorm.weight.detach().clone()
    disha.load_adapter(tiny_model, finetune.output / "adapter.safetensors")
    assert not torch.equal(tiny_model.model.layers[0].input_layernorm.weight, before)


def test_samples_from_before_are_the_base_models(finetune, plain):
    """Also where more than the adapter was trained."""
    report = finetune.good(also_train="embed|norm|lm_head", learning_rate=3e-2)
    found = [sample["before"] for sample in report["samples"]]
    assert found == [sample["before"] for sample in report_of(plain)["samples"]]


@pytest.mark.parametrize(
    ("name", "last"), [("cosine", math.sin(math.pi / 8) ** 2), ("linear", 1 / 4), ("constant", 1.0)]
)
def test_the_schedule_is_the_one_asked_for(finetune, name, last):
    finetune.good(lr_scheduler_type=name, max_steps=4, warmup_ratio=0, learning_rate=1e-3)
    rates = [line["learning_rate"] for line in metrics_of(finetune.output)[1:]]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 * last)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_to_measure_on_from_a_file_of_their_own(finetune, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[:5])
    report = finetune.good(eval_path=held_out, max_steps=1)
    assert report["data"]["held_out"]["rows"] == 5
    assert report["data"]["training"]["rows"] == 40
    assert report["loss"]["measured_on"] == "held-out"


def test_rows_that_are_also_trained_on_are_spoken_of(finetune):
    done = finetune(eval_split="train[:3]", max_steps=1, save_steps=2)
    assert done.code == 0, done.err
    assert "rows to train on that are also held out: 3; their loss says little" in done.out
    assert "--save_steps acts only with --save_strategy steps, which is not given" in done.out


def test_rows_to_measure_on_from_another_split(finetune, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train-a.jsonl", ROWS[:10])
    write_rows(folder / "train-b.jsonl", ROWS[10:20])
    write_rows(folder / "test.jsonl", ROWS[20:27])
    report = finetune.good(
        data_path=folder, eval_split="test[:4]", dataset_split="train[:75%]", max_steps=1
    )
    assert report["data"]["held_out"]["rows"] == 4
    assert report["data"]["training"]["rows"] == 15


def test_texts_of_one_field(finetune, tmp_path):
    data = write_rows(tmp_path / "texts.jsonl", [{"text": row["response"]} for row in ROWS])
    report = finetune.good(data_path=data, dataset_field="text")
    assert report["loss"]["after"] < report["loss"]["before"]
    assert report["samples"] == []
    assert not (finetune.output / "samples.md").exists()


def test_plain_text_is_a_text_a_line(finetune, tmp_path):
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"{row['response']}\n" for row in ROWS))
    report = finetune.good(data_path=data, dataset_field="text", max_steps=1)
    assert report["data"]["training"]["rows"] == 40


def test_chat_messages(finetune, tmp_path, tiny_folder):
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["query"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in ROWS
    ]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    report = finetune.good(
        base_model_name_or_path=tiny_folder("qwen3"), data_path=data, dataset_field="messages"
    )
    assert report["loss"]["after"] < report["loss"]["before"]


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(map(dict, ROWS))), path)
    return path


def write_json(path):
    path.write_text(json.dumps(list(map(dict, ROWS))))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("r.csv", write_csv), ("r.parquet", write_parquet), ("r.json", write_json)],
    ids=["csv", "parquet", "json"],
)
def test_rows_of_other_files_are_the_same_rows(finetune, tmp_path, plain, name, write):
    finetune.good(data_path=write(tmp_path / name))
    assert adapter_of(finetune.output) == adapter_of(plain)


def test_a_template_of_ones_own_surrounds_queries(finetune, plain):
    finetune.good(template=r"Q: {query}\nA: ", max_steps=1)
    assert losses_of(finetune.output) != losses_of(plain)[:1]
    metadata = disha.inspect_adapter(finetune.output / "adapter.safetensors").metadata
    assert metadata[TEMPLATE_KEY] == r"Q: {query}\nA: "


@pytest.mark.parametrize("count", [0, 1])
def test_as_many_samples_as_asked_for(finetune, count):
    report = finetune.good(samples=count)
    assert len(report["samples"]) == count
    assert (finetune.output / "samples.md").exists() == bool(count)
    assert ("sampling" in report["phase_seconds"]) == bool(count)


def test_samples_do_not_take_long(finetune, monkeypatch):
    monkeypatch.setattr(command, "SAMPLE_SECONDS", 0.0)
    for sample in finetune.good()["samples"]:
        for answer in (sample["before"], sample["after"]):
            assert not answer or answer.endswith("[... stopped, as it took too long]")


def test_samples_are_of_prompts_that_fit(finetune, tmp_path):
    rows = [*ROWS[:20], *({**row, "query": "hello world " * 400} for row in ROWS[20:])]
    data = write_rows(tmp_path / "long.jsonl", rows)
    report = finetune.good(data_path=data, max_steps=1, eval_fraction=0.25)
    assert report["data"]["training"]["cut"] + report["data"]["held_out"]["cut"] == 20
    page = (finetune.output / "samples.md").read_text()
    assert page.count("## Sample") == 3
    assert "hello world hello world" not in page


def test_bad_rows_may_be_skipped_and_are_counted(finetune, tmp_path):
    bad = [{"query": "a"}, {"query": "a", "response": 3}, {"query": "a", "response": " "}]
    data = write_rows(tmp_path / "some.jsonl", [*ROWS[:9], *bad])
    with data.open("a") as file:
        file.write("no JSON\n")
    report = finetune.good("--skip_bad_rows", data_path=data, max_steps=1)
    told = report["data"]["training"]
    assert (told["rows"], told["used"], told["bad"]) == (13, 9, 4)
    assert told["complaints"][0].startswith(f"{data}, line 10 has no field 'response'")


# --- what is written besides ----------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"init_weights": "bat", "also_train": "norm"}], ids=str)
def test_the_merged_folder_is_the_adapted_model(finetune, tiny_folder, changes):
    from transformers import AutoModelForCausalLM

    folder = tiny_folder("qwen3")
    finetune.good("--merge", base_model_name_or_path=folder, **changes)
    adapted = FolderCheckpoint(folder).load_model(torch.float32).eval()
    tokens = torch.randint(0, len(tiny_gguf.TOKENS), (2, 20))
    with torch.no_grad():
        untrained = adapted(tokens)
        disha.load_adapter(adapted, finetune.output / "adapter.safetensors")
        expected = adapted(tokens)
        merged = finetune.output / "merged"
        ours = FolderCheckpoint(merged).load_model(torch.float32).eval()(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untrained, expected, atol=1e-2)
    assert (merged / "tokenizer.json").exists()


def test_a_run_may_merge_again_in_the_same_folder(finetune, tiny_folder):
    for words in ((), ("--overwrite_output_dir",)):
        finetune.good("--merge", *words, base_model_name_or_path=tiny_folder("qwen3"), max_steps=1)


def test_a_model_that_is_no_folder_is_not_merged(finetune):
    done = finetune("--merge")
    assert done.code == 2
    assert "--merge writes a checkpoint as a folder like that of the base model" in done.complaint
    assert not finetune.output.exists()


def test_nothing_is_merged_into_the_folder_of_the_base_model(finetune, tmp_path):
    folder = tiny_checkpoints.write_folder(tmp_path / "model", "qwen3")
    before = contents_of(folder)
    for output in (folder, folder / "out"):
        done = finetune("--merge", base_model_name_or_path=folder, output_dir=output)
        assert done.code == 2
        assert f"--merge can't write to --output_dir {output}, because it is in" in done.complaint
    assert contents_of(folder) == before


def events_of(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(output / "tensorboard")).Reload()


def test_tensorboard_reads_losses_and_rates(finetune):
    finetune.good(report_to="tensorboard", eval_fraction=0.2, eval_steps=4)
    events = events_of(finetune.output)
    lines = metrics_of(finetune.output)
    for tag, name in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx({line["step"]: line[name] for line in lines if name in line})
    found = {event.step: event.value for event in events.Scalars("eval/loss")}
    expected = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert found == pytest.approx(expected)
    assert found.keys() == {0, 4, 6}


def checkpoints_in(output):
    return {path.name for path in output.glob("*checkpoint-*")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_strategy": "no", "save_steps": 2}, set()),
        ({"save_strategy": "steps", "save_steps": 2}, {2, 4, 6, 8}),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}, {8}),
        ({"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}, {6, 9}),
        ({"save_strategy": "epoch"}, {3, 6, 9}),
        ({"save_strategy": "epoch", "save_total_limit": 2}, {6, 9}),
    ],
    ids=str,
)
def test_checkpoints_are_saved_as_asked(finetune, changes, expected):
    """Forty rows in batches of four, four of these a step: three steps an epoch."""
    finetune.good(max_steps=9, gradient_accumulation_steps=4, **changes)
    assert checkpoints_in(finetune.output) == {f"checkpoint-{step}" for step in expected}


def test_a_file_of_flags_gives_the_run_of_the_flags(finetune, plain, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 5e-3\nmax_steps: 2\nbone-r: 8\nmax_seq_length: 96\n")
    unset = dict.fromkeys(("learning_rate", "bone_r", "max_seq_length"))
    report = finetune.good("--config", str(config), max_steps=6, **unset)
    assert report["settings"]["learning_rate"] == 5e-3
    assert adapter_of(finetune.output) == adapter_of(plain)


def test_an_unknown_name_in_a_file_of_flags_is_exit_code_2(finetune, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("max_step = 2\n")
    done = finetune("--config", str(config))
    assert done.code == 2
    assert "'max_step', which is not a flag; did you mean max_steps?" in done.complaint


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bone_r": 0}, "--bone_r must be at least 1"),
        ({"bone_r": 1000}, "1000"),
        ({"bone_r_out": 7}, "7"),
        ({"target": "no_such_layer"}, "no_such_layer"),
        ({"target": "("}, "("),
        ({"also_train": "no_such_parameter"}, "no_such_parameter"),
        ({"data_path": "absent.jsonl"}, "--data_path absent.jsonl does not exist"),
        ({"eval_path": "absent.jsonl"}, "--eval_path absent.jsonl does not exist"),
        ({"base_model_name_or_path": "absent.gguf"}, "absent.gguf does not exist"),
        ({"tokenizer": "absent.json"}, "absent.json"),
        ({"dataset_split": "trian"}, "no split 'trian'"),
        ({"dataset_split": "train[9"}, "train[9"),
        ({"dataset_split": "train[50:60]"}, "leaves no rows"),
        ({"eval_split": "validation"}, "no split 'validation'"),
        ({"dataset_field": ["query", "answer"]}, "no field 'answer'"),
        ({"template": "without a query"}, "--template must be"),
        ({"template": "chat"}, "--template chat needs a tokenizer with a chat template"),
        ({"max_seq_length": 1000}, "--max_seq_length must be at most 128"),
        ({"max_seq_length": 10}, "fit into --max_seq_length 10"),
        ({"dataset_field": ["a", "b", "c"]}, "--dataset_field must be one or two names"),
        ({"eval_fraction": 0.99}, "leaves none to train on"),
        ({"eval_steps": 5}, "--eval_steps needs rows to measure on"),
        ({"output_dir": None}, "--output_dir FOLDER is missing"),
        ({"data_path": None}, "--data_path rows.jsonl is missing"),
        ({"base_model_name_or_path": None}, "--base_model_name_or_path path/to/model is missing"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(finetune, changes, complaint):
    done = finetune(**changes)
    assert done.code == 2
    assert complaint in done.complaint
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"query": "a"}', "has no field 'response'; its fields are: 'query'"),
        ('{"query": "a", "response": 3}', "field 'response' must be text, found int 3"),
        ('{"query": "a", "response": ""}', "field 'response' is empty"),
        ("[1]", "holds a JSON list; every line must hold one JSON object"),
        ("{", "is not JSON"),
        ('{"query": "\\ud800", "response": "b"}', "half of a surrogate pair"),
    ],
)
def test_malformed_rows_name_file_and_line(finetune, line, complaint):
    with finetune.data.open("a") as file:
        file.write(f"\n{line}\n")
    done = finetune(max_steps=20)
    assert done.code == 2
    assert f"{finetune.data}, line 42" in done.complaint
    assert complaint in done.complaint
    assert not (finetune.output / "adapter.safetensors").exists()


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [[], ["--resume"], ["--overwrite_output_dir"]], ids=str)
def test_a_folder_in_use_is_exit_code_1_before_anything_is_read(finetune, monkeypatch, words):
    def read(*_):
        raise AssertionError("it has begun to read")

    finetune.good(max_steps=2, save_strategy="steps", save_steps=1)
    before = contents_of(finetune.output)
    monkeypatch.setattr(command, "load_inputs", read)
    with FolderLock(finetune.output).held():
        done = finetune(*words)
        assert done.code == 1
        assert f"--output_dir {finetune.output} is in use by another run" in done.complaint
        assert f"process {os.getpid()} on " in done.complaint
        (finetune.output / LOCK).write_text("\x1b[2J\n")
        assert "another run: \\x1b[2J; wait" in finetune(*words).complaint
    assert contents_of(finetune.output) == before


@pytest.mark.parametrize("result", ["adapter.safetensors", "merged"])
def test_a_finished_run_is_not_replaced_unasked(finetune, plain, result):
    (finetune.output / "merged").mkdir(parents=True)
    if result == "adapter.safetensors":
        (finetune.output / "merged").rmdir()
        (finetune.output / result).write_bytes(b"of an earlier run")
    before = contents_of(finetune.output)
    done = finetune()
    assert done.code == 2
    assert f"holds {result} of a finished run; start over with --overwrite_output_dir" in (
        done.complaint
    )
    done = finetune("--resume")
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        f"{finetune.output} holds a finished run, and no checkpoint to resume from: nothing to do; "
        "--overwrite_output_dir starts over\n"
    )
    assert contents_of(finetune.output) == before
    finetune.good("--overwrite_output_dir")
    assert adapter_of(finetune.output) == adapter_of(plain)


def test_what_a_killed_run_was_writing_goes_when_the_next_begins(finetune):
    finetune.good(max_steps=1)
    before = contents_of(finetune.output)
    names = {*FILES, "merged"}
    for name in names:
        draft = finetune.output / f".{name}.0123456789abcdef.tmp"
        draft.mkdir()
        (draft / "new").write_bytes(b"a part of it")
    assert contents_of(finetune.output) != before
    for words in ([], ["--resume"]):
        finetune(*words)
        assert contents_of(finetune.output) == before
        assert {path.name for path in finetune.output.iterdir()} == FILES


@pytest.mark.parametrize("name", ["data_path", "eval_path"])
@pytest.mark.parametrize("place", [".", "new/out", "link/out"])
def test_results_do_not_go_where_rows_are_read(finetune, tmp_path, name, place):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "rows.jsonl")
    (tmp_path / "link").symlink_to(folder)
    output = tmp_path / place if place.startswith("link") else folder / place
    done = finetune(**{name: folder, "output_dir": output})
    assert done.code == 2
    assert f"--output_dir {output} is in --{name} {folder}" in done.complaint
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
    finetune.good(**{name: folder, "output_dir": tmp_path / "rows-out", "max_steps": 1})


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_a_file_without_rows_is_exit_code_2(finetune, content):
    finetune.data.write_text(content)
    done = finetune("--skip_bad_rows")
    assert done.code == 2
    assert str(finetune.data) in done.complaint
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--learning_rat", "1e-3"], "learning_rate"),
        (["--packin"], "packing"),
        (["--bits", "7"], "bf16"),
        (["--bone_r", "many"], "bone_r"),
        (["--init_weights", "svd"], "bat"),
        (["--method", "lora"], "bone"),
        (["--save_strategy", "sometimes"], "epoch"),
        (["--report_to", "comet"], "some of tensorboard, wandb, trackio, mlflow, got 'comet'"),
        (["--lr_scheduler_type", "sine"], "cosine"),
        (["--strategy", "zero"], "fsdp"),
        (["--bf16", "maybe"], "--bf16 must be True or False, got 'maybe'"),
        (["--max_steps", "1.5"], "max_steps"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--seed"], "seed"),
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2_and_names_the_nearest(finetune, given, complaint):
    done = finetune(*given)
    assert done.code == 2
    assert complaint in done.complaint
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"bone_r": 1000}, "q_proj and 11 more: --bone_r 1000 is larger than in_features=64"),
        ({"bone_r_out": 7}, "or an --bone_r_out that divides the outputs of all"),
        ({"target": "qproj"}, "--target 'qproj' selects no layer that can be adapted; the nearest"),
        ({"target": "norm"}, "4 more: no layer kind adapts RMSNorm"),
        ({"exclude": "zzz"}, "--exclude 'zzz' matches no module of the model"),
        ({"exclude": "."}, "selects only modules that can't be adapted: "),
        ({"rank_pattern": "zzz=4"}, "--rank_pattern 'zzz' matches no module of the model"),
        ({"rank_pattern": "v_proj=1000"}, "--bone_r 1000 is larger than in_features=64"),
        ({"also_train": "zzz"}, "--also_train 'zzz' matches no parameter"),
        ({"method": "lora"}, "--method: unknown method 'lora'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_the_model_is_said_in_flags(finetune, given, complaint):
    done = finetune(**given)
    assert done.code == 2
    assert complaint in done.complaint
    assert len(done.complaint) < 500
    for argument in ("r=", "rank_pattern=", "exclude=", "target_regex", "`"):
        assert argument not in done.complaint
    assert not (finetune.output / "adapter.safetensors").exists()


def test_another_architecture_is_exit_code_2(finetune, tmp_path):
    model = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", tiny_gguf.random_state(tied=True), architecture="gptneox"
    )
    done = finetune(base_model_name_or_path=model)
    assert done.code == 2
    assert "architecture 'gptneox'" in done.complaint
    assert "--model" in done.complaint
    assert not finetune.output.exists()


def test_a_model_that_gives_no_number_is_exit_code_1(finetune, tmp_path):
    state = tiny_gguf.random_state(tied=True)
    state["model.norm.weight"][0] = float("nan")
    model = tiny_gguf.write_gguf(tmp_path / "nan.gguf", state)
    done = finetune(base_model_name_or_path=model, eval_fraction=0.25)
    assert done.code == 1
    assert "the held-out loss is nan, which must be finite" in done.complaint
    assert not (finetune.output / "adapter.safetensors").exists()


def spoil(monkeypatch, step, action):
    """Let something happen in the forward pass that follows a step."""
    after_step(monkeypatch, step, lambda: monkeypatch.setattr(Objective, "__call__", action))


def test_a_loss_that_is_no_number_stops_and_names_the_checkpoint(finetune, monkeypatch):
    spoil(monkeypatch, 3, lambda *_: torch.tensor(float("nan"), requires_grad=True))
    done = finetune(save_strategy="steps", save_steps=2)
    assert done.code == 1
    assert "training stopped at step 4: loss nan" in done.complaint
    newest = finetune.output / "checkpoint-2"
    assert f"{newest} is complete: --resume goes on from there" in done.complaint
    monkeypatch.undo()
    finetune.good("--resume", save_strategy="steps", save_steps=2)


def test_an_adapter_that_overflows_names_the_checkpoint_before(finetune, monkeypatch):
    def overflow():
        monkeypatch.setattr("disha.files.contents.finite_as", lambda *_: False)

    after_step(monkeypatch, 4, overflow)
    done = finetune(save_strategy="steps", save_steps=2)
    assert done.code == 1
    assert "holds values that are not finite" in done.complaint
    newest = finetune.output / "checkpoint-2"
    assert f"{newest} is complete: --resume goes on from there" in done.complaint


def test_a_learning_rate_beyond_all_numbers_is_exit_code_1(finetune):
    done = finetune(learning_rate=1e39, save_strategy="steps", save_steps=1)
    assert done.code == 1
    assert "holds values that are not finite" in done.complaint
    assert not (finetune.output / "adapter.safetensors").exists()


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("step", [None, 3])
def test_lack_of_memory_says_what_to_lower(finetune, monkeypatch, step):
    if step is None:
        monkeypatch.setattr(Objective, "__call__", out_of_memory)
    else:
        spoil(monkeypatch, step, out_of_memory)
    done = finetune(save_strategy="steps", save_steps=2)
    assert done.code == 1
    assert done.complaint.count("there is not enough memory") == 1
    assert "lower --per_device_train_batch_size" in done.complaint
    assert (step is not None) == ("checkpoint-2 is complete" in done.complaint)


def test_lack_of_memory_for_the_model_says_so_too(finetune, monkeypatch):
    def no_room(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(GGUFCheckpoint, "load_model", no_room)
    done = finetune()
    assert done.code == 1
    assert "there is not enough memory on this machine" in done.complaint


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_files_of_an_earlier_run(finetune, monkeypatch, place):
    finetune.good(max_steps=1)
    before = {path.name: path.read_bytes() for path in finetune.output.iterdir()}
    after_step(monkeypatch, 2, lambda: monkeypatch.setattr(place, full))
    done = finetune("--overwrite_output_dir", max_steps=2)
    assert done.code == 1
    assert "No space left on device" in done.complaint
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in finetune.output.iterdir()}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"metrics.jsonl"}


def test_a_full_disk_for_a_checkpoint_names_the_one_before(finetune, monkeypatch):
    after_step(monkeypatch, 4, lambda: monkeypatch.setattr("os.fsync", full))
    done = finetune(save_strategy="steps", save_steps=2)
    assert done.code == 1
    assert "checkpoint-4 can't be written: No space left on device; make room" in done.complaint
    assert "checkpoint-2, the newest" in done.complaint
    assert checkpoints_in(finetune.output) == {"checkpoint-2"}


def test_an_error_at_any_operation_is_one_line(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for an adapter that has no place
    flags = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = Faults(finetune.output)
    with whole():
        finetune.good(**flags)
    codes = set()
    for turn, at in enumerate(range(20, len(whole.done), len(whole.done) // 7)):
        shutil.rmtree(finetune.output, ignore_errors=True)  # there may be none
        with Faults(finetune.output, at, CODES[turn % len(CODES)])():
            done = finetune(**flags)
        if done.code:
            assert os.strerror(CODES[turn % len(CODES)]) in done.complaint
            assert not [*finetune.output.rglob("*.tmp")]
        else:
            assert disha.inspect_adapter(finetune.output / "adapter.safetensors").layers
        codes.add(done.code)
    assert 1 in codes


def after_training(monkeypatch, action):
    """Let something happen between training and saving."""
    train = command.train

    def train_and_act(*arguments):
        course = train(*arguments)
        action()
        return course

    monkeypatch.setattr(command, "train", train_and_act)


@pytest.mark.parametrize("step", [None, 1, 3])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_output_folder_that_was_removed_is_made_again(finetune, monkeypatch, plain, step):
    def remove():
        shutil.rmtree(finetune.output)

    if step is None:
        after_training(monkeypatch, remove)
    else:
        after_step(monkeypatch, step, remove)
    done = finetune(save_strategy="steps", save_steps=4, report_to="tensorboard")
    assert done.code == 0, done.err
    assert f"{finetune.output} was deleted while this run writes to it" in done.err
    assert adapter_of(finetune.output) == adapter_of(plain)
    if step is None:
        return
    assert timeless(metrics_of(finetune.output)) == timeless(metrics_of(plain))
    assert checkpoints_in(finetune.output) == {"checkpoint-4"}
    assert {path.name for path in finetune.output.iterdir()} >= FILES
    events = events_of(finetune.output).Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]


def test_an_adapter_that_was_removed_with_its_folder_is_missed(finetune, monkeypatch):
    work = command.plot_losses

    def remove_and_work(*arguments):
        shutil.rmtree(finetune.output)
        return work(*arguments)

    monkeypatch.setattr(command, "plot_losses", remove_and_work)
    done = finetune()
    assert done.code == 1
    assert f"the adapter was deleted: {finetune.output / 'adapter.safetensors'}" in done.err


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 4}], ids=str)
def test_a_removed_folder_that_another_run_has_taken_is_left_to_it(
    finetune, monkeypatch, tmp_path, plain, saving
):
    other = FolderLock(finetune.output)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as stack:

        def take():
            shutil.rmtree(finetune.output)
            stack.enter_context(other.held())

        after_step(monkeypatch, 2, take)
        done = finetune(**saving)
        assert [path.name for path in finetune.output.iterdir()] == [LOCK]
    assert done.code == 1
    warning, complaint = done.err.splitlines()
    assert warning.startswith("disha: warning: metrics.jsonl can't be written: --output_dir ")
    assert f"is in use by another run: process {os.getpid()} on" in complaint
    if not saving:
        [saved] = tmp_path.glob("disha-*/adapter.safetensors")
        assert f"the adapter was saved as {saved} instead" in complaint
        assert saved.read_bytes() == adapter_of(plain)


@pytest.mark.parametrize("step", [None, 2])
def test_an_adapter_that_has_no_place_is_saved_elsewhere(finetune, monkeypatch, tmp_path, step):
    def block():
        shutil.rmtree(finetune.output)
        finetune.output.write_text("")

    if step is None:
        after_training(monkeypatch, block)
    else:
        after_step(monkeypatch, step, block)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = finetune(max_steps=4)
    [saved] = tmp_path.glob("disha-*/adapter.safetensors")
    assert done.code == 1
    assert f"the adapter was saved as {saved} instead" in done.err.splitlines()[-1]
    assert disha.inspect_adapter(saved).layers


@pytest.mark.parametrize("name", ["loss.png", "report.json"])
def test_a_result_that_can_not_be_written_says_where_the_adapter_is(finetune, monkeypatch, name):
    replace = os.replace

    def replace_others(source, target):
        (full if target.name == name else replace)(source, target)

    monkeypatch.setattr("os.replace", replace_others)
    done = finetune(max_steps=1)
    assert done.code == 1
    adapter = finetune.output / "adapter.safetensors"
    assert f"{name}: No space left on device" in done.complaint
    assert f"the adapter is complete in {adapter}" in done.complaint
    assert disha.inspect_adapter(adapter).layers


@pytest.mark.parametrize("error", [disha.MergeError("tied"), torch.OutOfMemoryError("x")], ids=str)
def test_work_after_training_that_fails_says_where_the_adapter_is(
    finetune, monkeypatch, tiny_folder, error
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(command, "merge_into_base", fail)
    done = finetune("--merge", base_model_name_or_path=tiny_folder("qwen3"), max_steps=1, samples=0)
    assert done.code == 1
    adapter = finetune.output / "adapter.safetensors"
    assert f"the adapter is complete in {adapter}" in done.complaint
    assert disha.inspect_adapter(adapter).layers


def test_a_disagreement_is_exit_code_1_and_reported(finetune, monkeypatch):
    def disagree(settings, adapter, inputs, trained):
        tolerance = Tolerance(loaded=1e-4, merged=1e-3)
        return Verification(trained, trained + 1, trained, tolerance, None)

    monkeypatch.setattr("disha.finetune.command.verify_in_fresh_process", disagree)
    done = finetune("--verify", max_steps=1)
    assert done.code == 1
    assert "does not give the trained model's loss" in done.complaint
    assert report_of(finetune.output)["verification"]["agrees"] is False


def test_debug_shows_where_an_error_came_from(finetune, tmp_path):
    done = finetune("--debug", base_model_name_or_path=tmp_path / "absent.gguf")
    assert done.code == 2
    assert "Traceback" in done.err
    assert "does not exist" in done.err.splitlines()[-1]
