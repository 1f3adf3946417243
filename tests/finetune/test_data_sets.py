"""Several data sets, with and without weights."""

from __future__ import annotations

import collections
import json

import pytest

from disha.cli import main
from disha.cli.finetune import settings_from
from disha.finetune.inputs import load_inputs
from tests.finetune.command_line import (
    ROWS,
    adapter_of,
    arguments,
    killed_after,
    losses_of,
    report_of,
    result_of,
    write_rows,
)
from tests.finetune.together import run_together


@pytest.fixture
def sets(tmp_path):
    """Two data sets: of 24 rows, and of 16 with other fields."""
    second = [{"asked": row["query"], "answered": row["response"]} for row in ROWS[24:]]
    return [
        write_rows(tmp_path / "first.jsonl", ROWS[:24]),
        write_rows(tmp_path / "second.jsonl", second),
    ]


FIELDS = ["query", "response", "asked", "answered"]


def flags(sets, **changes):
    return {"data_path": sets, "dataset_field": FIELDS, "max_steps": None, **changes}


def rows_of(tiny_path, tmp_path, epoch, changes):
    """The texts of an epoch's rows, as the model sees them."""
    words = arguments(tiny_path, None, tmp_path / "out", **changes)
    inputs = load_inputs(settings_from(words[1:]))
    decode = inputs.base.tokenizer.decode
    return [
        decode(example.tokens)
        for batch in inputs.source.batches(epoch)
        for row in batch
        for example in row
    ]


@pytest.mark.parametrize("way", [{}, {"packing": True}], ids=str)
def test_without_weights_an_epoch_has_every_row_once(finetune, tmp_path, sets, way):
    finetune.good(output_dir=tmp_path / "one", max_steps=None, **way)
    steps = {"max_steps": report_of(tmp_path / "one")["training"]["steps"]}
    report = finetune.good(**flags(sets, **way, **steps))
    assert report["data"]["training"]["rows"] == len(ROWS)
    assert adapter_of(finetune.output) == adapter_of(tmp_path / "one")


@pytest.mark.parametrize(
    "way",
    [{}, {"packing": True}, {"streaming": True}],
    ids=str,
)
def test_weights_are_the_parts_of_an_epoch(tiny_path, tmp_path, sets, way):
    changes = flags(sets, data_weights=[1, 3], **way)
    for epoch in (1, 2):
        texts = rows_of(tiny_path, tmp_path, epoch, changes)
        words = collections.Counter(text.split("say ")[1].split()[0] for text in texts)
        first = sum(words[word] for word in ("hello", "world", "well"))
        assert (first, len(texts)) == (10, 40)
        assert texts == rows_of(tiny_path, tmp_path, epoch, changes)
        # 30 rows of 16: each comes once or twice.
        often = collections.Counter(text for text in texts if "yellow" in text or "hollow" in text)
        assert len(often) == 16
        assert set(often.values()) == {1, 2}


def test_what_is_drawn_is_told(finetune, sets):
    done = finetune("--dry_run", **flags(sets, data_weights=[1, 3]))
    assert done.code == 0, done.err
    assert f"an epoch draws 10 rows of {sets[0]}\nan epoch draws 30 rows of {sets[1]}\n" in done.out


def test_splits_and_held_out_rows_are_of_each_data_set(finetune, sets):
    split = ["train[:20]", "train[:50%]"]
    report = finetune.good(**flags(sets, dataset_split=split, eval_fraction=0.25, max_steps=1))
    assert report["data"]["training"]["rows"] == 15 + 6
    assert report["data"]["held_out"]["rows"] == 5 + 2
    report = finetune.good(
        "--overwrite_output_dir",
        **flags(sets, dataset_split="train[:-4]", eval_split="train[-4:]", max_steps=1),
    )
    assert report["data"]["held_out"]["rows"] == 8
    assert all(sample["query"].startswith("say ") for sample in report["samples"])


def test_a_config_file_holds_lists(finetune, sets, tmp_path):
    config = tmp_path / "run.json.yaml"
    config.write_text(json.dumps({"data_path": list(map(str, sets)), "data_weights": [2, 1]}))
    words = ("--config", str(config), "--dry_run")
    done = finetune(*words, **flags(None))
    assert done.code == 0, done.err
    assert "an epoch draws 27 rows of" in done.out


@pytest.mark.parametrize(
    "way",
    [{}, {"packing": True}, {"streaming": True}],
    ids=str,
)
@pytest.mark.parametrize("step", [4, 12])
def test_killed_and_resumed_a_run_comes_to_the_same_end(finetune, tmp_path, sets, way, step):
    changes = flags(sets, data_weights=[1, 3], max_steps=14, eval_fraction=0.1, **way)
    changes |= {"save_strategy": "steps", "save_steps": 3}
    finetune.good(output_dir=tmp_path / "straight", **changes)
    killed_after(step, lambda: finetune(**changes))
    finetune.good("--resume", **changes)
    assert result_of(finetune.output) == result_of(tmp_path / "straight")


def test_two_processes_learn_what_one_does(finetune, tmp_path, tiny_path, sets):
    changes = flags(sets, data_weights=[1, 3], max_steps=6)
    finetune.good(**changes, gradient_accumulation_steps=2)
    words = arguments(tiny_path, None, tmp_path / "together", **changes)
    run_together(2, words, tmp_path / "log.txt")
    assert losses_of(tmp_path / "together") == pytest.approx(losses_of(finetune.output), rel=1e-5)


@pytest.mark.parametrize("weights", [[-1, 2], [0, 0], [1], [1, 2, 3], ["nan", 1], ["inf", 1]])
def test_weights_that_make_no_sense_are_refused(finetune, sets, weights):
    done = finetune(**flags(sets, data_weights=weights))
    assert done.code == 2
    assert "--data_weights must " in done.complaint
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_split": ["train"] * 3}, "--dataset_split must be one split, or one for each of"),
        ({"dataset_field": FIELDS[:3]}, "must be one or two names, or two for each of the 2 data"),
        ({"dataset_field": ["query", "response"]}, "second.jsonl, line 1 has no field 'query'"),
        ({"dataset_field": [*FIELDS[:3], "asked"]}, "--dataset_field needs two different fields"),
    ],
)
def test_what_does_not_fit_the_data_sets_is_refused(finetune, sets, changes, said):
    done = finetune(**{**flags(sets), **changes})
    assert done.code == 2
    assert said in done.complaint


def test_weights_are_for_text(finetune, tmp_path):
    paths = [write_rows(tmp_path / n, [{"x": [1.0], "y": [2.0]}]) for n in ("a.jsonl", "b.jsonl")]
    done = finetune(
        base_model_name_or_path=None,
        model="tests.finetune.factories:regressor",
        data_path=paths,
        dataset_field=["x", "y"],
        data_weights=[1, 2],
    )
    assert done.code == 2
    assert "--data_weights is for text" in done.complaint


def test_evaluate_measures_them_together(tiny_path, sets, tmp_path, capsys):
    def measured(*words):
        capsys.readouterr()
        base = ("--base_model_name_or_path", str(tiny_path), "--max_seq_length", "96", "--json")
        assert main(["evaluate", *base, *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)

    together = measured("--data_path", *sets, "--dataset_field", *FIELDS)
    alone = measured("--data_path", write_rows(tmp_path / "all.jsonl", ROWS))
    assert together == alone
