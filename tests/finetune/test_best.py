"""The best checkpoint, and stopping early."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from disha.cli import main
from disha.finetune.course import MOST_ANSWERS, MOST_TOKENS
from tests.finetune.command_line import (
    ROWS,
    arguments,
    interrupted_after,
    killed_after,
    metrics_of,
    report_of,
    result_of,
    write_rows,
)
from tests.finetune.together import run_together

pytestmark = pytest.mark.usefixtures("without_plots_and_samples")

STEPS = 20
USUAL = {
    "max_steps": STEPS,
    "learning_rate": 0.03,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "adapter_dropout": 0.2,
    "bone_r": 4,
}

HELD_OUT = [{**row, "response": row["response"][::-1]} for row in ROWS[::4]]
"""Their loss falls at first, and rises when the rows to train on are learned."""

BEST = {"load_best_model_at_end": True}
STOPPING = {"early_stopping_patience": 2}


def values_of(path):
    return load_file(path / "adapter.safetensors")


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def losses_in(output):
    return {line["step"]: line["eval_loss"] for line in metrics_of(output) if "eval_loss" in line}


def slow_best(losses):
    """The first step with the lowest loss."""
    best = 0
    for step, loss in losses.items():
        if loss < losses[best]:
            best = step
    return best


def slow_end(losses, patience):
    """The step at which patience ends, or the last one."""
    best = waited = 0
    for step, loss in losses.items():
        if step and loss < losses[best]:
            best, waited = step, 0
        elif step:
            waited += 1
        if waited == patience:
            return step
    return max(losses)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The usual flags, with the path of the held-out rows."""
    path = write_rows(tmp_path_factory.mktemp("held-out") / "rows.jsonl", HELD_OUT)
    return {**USUAL, "eval_path": path}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_path, usual):
    """A run to the end, with a checkpoint at every measurement."""
    folder = tmp_path_factory.mktemp("plain")
    data = write_rows(folder / "rows.jsonl")
    assert main(arguments(tiny_path, data, folder / "out", **usual)) == 0
    losses = losses_in(folder / "out")
    assert 0 < slow_best(losses) < STEPS, losses
    assert slow_end(losses, 2) < STEPS, losses
    return folder / "out"


@pytest.fixture(scope="module")
def best(tmp_path_factory, tiny_path, usual, plain):
    output = tmp_path_factory.mktemp("best") / "out"
    assert main(arguments(tiny_path, plain.parent / "rows.jsonl", output, **usual, **BEST)) == 0
    return output


def test_the_saved_adapter_is_that_of_the_best_step(plain, best):
    losses = losses_in(plain)
    assert losses_in(best) == losses
    step = slow_best(losses)
    assert_same(values_of(best), values_of(plain / f"checkpoint-{step}"))
    loss = report_of(best)["loss"]
    assert (loss["saved_step"], loss["after"]) == (step, losses[step])
    assert report_of(plain)["loss"]["saved_step"] == STEPS


def test_a_run_that_was_stopped_there_has_the_same_adapter(finetune, usual, plain, best):
    finetune.good(**{**usual, "max_steps": slow_best(losses_in(plain))})
    assert_same(values_of(finetune.output), values_of(best))


def test_perplexity_has_the_same_best_step_as_loss(finetune, usual, best):
    done = finetune(**usual, **BEST, metric_for_best_model="perplexity", save_total_limit=1)
    assert done.code == 0, done.err
    assert_same(values_of(finetune.output), values_of(best))
    assert re.search(r"the adapter is that of step \d+: held-out perplexity \d+\.\d{4}\n", done.out)
    # Only the last checkpoint is left, and has the best adapter too.
    assert [path.name for path in finetune.output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same(
        load_file(finetune.output / f"checkpoint-{STEPS}" / "best.safetensors"), values_of(best)
    )


def test_where_training_makes_it_worse_the_start_is_the_best(finetune, usual, best):
    start = best / "adapter.safetensors"
    changes = {**usual, **BEST, "learning_rate": 10.0, "max_steps": 4, "adapter": start}
    report = finetune.good(**changes)
    assert report["loss"]["saved_step"] == 0
    assert report["loss"]["after"] == report["loss"]["before"]
    assert_same(values_of(finetune.output), values_of(best))


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_run_stops_where_patience_ends(finetune, usual, plain, patience):
    losses = losses_in(plain)
    end = slow_end(losses, patience)
    done = finetune(**usual, early_stopping_patience=patience)
    assert done.code == 0, done.err
    report = report_of(finetune.output)
    assert report["training"]["steps"] == end
    assert report["training"]["stopped_early"] == (end < STEPS)
    assert_same(values_of(finetune.output), values_of(plain / f"checkpoint-{end}"))
    kept = {step: loss for step, loss in losses.items() if step <= end}
    step = slow_best(kept)
    plural = "s" * (patience > 1)
    said = (
        f"stopped early after step {end}: {patience} measurement{plural} without a better value "
        f"than the held-out loss {losses[step]:.4f} of step {step}\n"
    )
    assert (said in done.out) == (end < STEPS)


@pytest.mark.parametrize("step", range(3, STEPS, 4))
@pytest.mark.parametrize("limit", [None, 1])
def test_killed_and_resumed_it_comes_to_the_same_end(finetune, usual, best, step, limit):
    changes = {**usual, **BEST, "save_steps": 3, "save_total_limit": limit}
    killed_after(step, lambda: finetune(**changes))
    finetune.good("--resume", **changes)
    assert result_of(finetune.output) == result_of(best)


@pytest.mark.parametrize("step", [2, 7, 11])
def test_interrupted_and_resumed_it_stops_at_the_same_step(finetune, tmp_path, usual, plain, step):
    both = {**usual, **STOPPING, **BEST, "save_strategy": "no"}
    finetune.good(output_dir=tmp_path / "straight", **both)
    end = slow_end(losses_in(plain), 2)
    done = interrupted_after(step, lambda: finetune(**both))
    if step < end:
        assert done.code == 130
        finetune.good("--resume", **both)
    assert result_of(finetune.output) == result_of(tmp_path / "straight")


def test_a_run_that_has_stopped_early_does_not_go_on(finetune, usual):
    """Its last checkpoint was saved at the step where patience ended."""
    first = finetune.good(**usual, **STOPPING)
    before = result_of(finetune.output)
    report = finetune.good("--resume", **usual, **STOPPING)
    assert report["training"]["steps"] == first["training"]["steps"]
    assert result_of(finetune.output) == before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_keep_the_same_best(tmp_path, tiny_path, usual, plain, strategy):
    data, output, log = plain.parent / "rows.jsonl", tmp_path / "out", tmp_path / "log.txt"
    changes = {**usual, **BEST, **STOPPING}
    words = arguments(tiny_path, data, output, strategy=strategy, **changes)
    run_together(2, words, log)
    losses, saved = losses_in(output), report_of(output)["loss"]["saved_step"]
    end = report_of(output)["training"]["steps"]
    assert (saved, end) == (slow_best(losses), slow_end(losses, 2))
    assert saved < end
    values = values_of(output)
    assert_same(values, values_of(output / f"checkpoint-{saved}"))
    shutil.rmtree(output / f"checkpoint-{end}")  # so that they resume between best and end
    run_together(2, [*words, "--resume"], log)
    assert_same(values_of(output), values)
    assert losses_in(output) == losses
    assert main([*arguments(tiny_path, data, output, **changes), "--resume"]) == 0
    assert_same(values_of(output), values)


# --- exact answers -------------------------------------------------------------------------------


def test_the_best_has_the_most_exact_answers(finetune, tmp_path, capsys, tiny_path):
    """Counted by `disha evaluate`, for the adapter of every checkpoint."""
    words = ["hello", "world", "well"]
    rows = [{**row, "response": row["response"].split()[0]} for row in ROWS if row["type"]]
    rows = [row for row in rows if row["response"] in words]
    data, held_out = write_rows(tmp_path / "all.jsonl", rows), write_rows(tmp_path / "h", rows[::3])
    held_out = held_out.rename(tmp_path / "held-out.jsonl")
    changes = {
        **USUAL,
        **BEST,
        "metric_for_best_model": "exact_match",
        "eval_path": held_out,
        "learning_rate": 0.02,
        "adapter_dropout": 0,
        "data_path": data,
    }
    report = finetune.good(**changes)
    measured = {
        line["step"]: line["eval_exact_match"]
        for line in metrics_of(finetune.output)
        if "eval_exact_match" in line
    }
    assert len(set(measured.values())) > 1, measured
    best = next(step for step, part in measured.items() if part == max(measured.values()))
    assert report["loss"]["saved_step"] == best
    for step in list(measured)[1::3]:
        adapter = finetune.output / f"checkpoint-{step}" / "adapter.safetensors"
        flags = ("--base_model_name_or_path", tiny_path, "--adapter", adapter, "--exact_match")
        flags = (*flags, "--data_path", held_out, "--max_seq_length", 96, "--json")
        capsys.readouterr()
        assert main(["evaluate", *map(str, flags)]) == 0
        exact = int(re.search(r'"exact": (\d+)', capsys.readouterr().out)[1])
        assert exact / len(rows[::3]) == measured[step]


def test_answers_are_bounded(finetune, monkeypatch):
    from disha.finetune import evaluating

    asked = []

    def complete(model, prompts, *, max_new_tokens, ends):
        asked.append((len(prompts), max_new_tokens))
        return [[] for _ in prompts]

    monkeypatch.setattr(evaluating, "complete", complete)
    data = write_rows(finetune.data.with_name("many.jsonl"), [*ROWS] * 5)
    finetune.good(
        **{**USUAL, **BEST, "max_steps": 2, "eval_fraction": 0.5},
        metric_for_best_model="exact_match",
        data_path=data,
    )
    assert asked == [(MOST_ANSWERS, MOST_TOKENS)] * 2
