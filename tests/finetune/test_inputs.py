from __future__ import annotations

import pytest
import torch

from disha.finetune.errors import DataError, SettingsError
from disha.finetune.inputs import MOST_CHECKED_TRAINING_ROWS, first_rows, load_inputs
from disha.finetune.settings import FinetuneSettings
from tests.finetune.command_line import ROWS, with_values, write_rows


@pytest.fixture
def settings(tmp_path, tiny_path):
    return with_values(
        FinetuneSettings(),
        base_model_name_or_path=tiny_path,
        output_dir=tmp_path / "out",
        data_path=(write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS]),),
        max_seq_length=96,
        max_steps=1,
    )


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"streaming": True, "packing": True}])
def test_the_source_is_the_one_asked_for(settings, changes):
    inputs = load_inputs(with_values(settings, **changes))
    batch = inputs.source.collate(next(iter(inputs.source.batches(1))))
    assert batch.weight > 0
    assert (batch.positions is not None) == ("packing" in changes)


def test_without_held_out_rows_the_first_training_rows_are_checked(settings):
    inputs = load_inputs(settings)
    checked = inputs.checked
    assert (checked.name, checked.held_out) == ("first training rows'", False)
    assert list(checked.rows) == list(inputs.source.examples[:MOST_CHECKED_TRAINING_ROWS])
    assert next(iter(first_rows(inputs.dataset))).fields == ROWS[0]


def test_held_out_rows_are_checked_and_not_trained_on(settings):
    inputs = load_inputs(with_values(settings, eval_fraction=0.25))
    assert (inputs.checked.name, inputs.checked.held_out) == ("held-out", True)
    assert (len(inputs.checked.rows), len(inputs.source.examples)) == (20, 60)
    assert inputs.checked.tally.used == 20
    assert first_rows(inputs.dataset) is inputs.dataset.held_out


def test_rows_that_are_trained_on_and_held_out_are_counted(settings, tmp_path):
    assert load_inputs(settings).shared_rows() == 0
    assert load_inputs(with_values(settings, eval_split="train[:5]")).shared_rows() == 10
    other = write_rows(tmp_path / "other.jsonl", [{**ROWS[0], "response": "never"}])
    assert load_inputs(with_values(settings, eval_path=other)).shared_rows() == 0


def test_checked_batches_hold_every_row_once(settings):
    checked = load_inputs(with_values(settings, eval_fraction=0.25)).checked
    found = sum(int((batch.labels != -100).sum()) for batch in checked.batches())
    assert found == sum(example.supervised for example in checked.rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [{**rows[0], "response": "other"}, *rows[1:]],
        lambda rows: [*rows[:-1], {**rows[-1], "query": "other"}],
    ],
    ids=["fewer", "the first", "the last"],
)
def test_the_digest_tells_other_rows(settings, change):
    before = load_inputs(settings).contents()
    assert load_inputs(settings).contents() == before
    write_rows(settings.data.data_path[0], change([*ROWS, *ROWS]))
    assert load_inputs(settings).contents()["set of rows"] != before["set of rows"]


def test_templates_are_for_two_fields_only(settings):
    assert load_inputs(settings).encoder.template is not None
    assert load_inputs(with_values(settings, dataset_field=("query",))).encoder.template is None


def test_too_long_a_row_for_the_model_is_refused(settings):
    with pytest.raises(SettingsError, match="--max_seq_length must be at most 128"):
        load_inputs(with_values(settings, max_seq_length=129))


def test_rows_of_numbers_for_a_model_without_a_tokenizer(settings, tmp_path):
    rows = [{"x": [0.5 * n] * 4, "y": n % 3} for n in range(70)]
    settings = with_values(
        settings,
        base_model_name_or_path=None,
        model="tests.finetune.factories:classifier",
        data_path=(write_rows(tmp_path / "numbers.jsonl", rows),),
        dataset_field=("x", "y"),
    )
    inputs = load_inputs(settings)
    assert inputs.encoder is None
    assert len(inputs.checked.rows) == MOST_CHECKED_TRAINING_ROWS
    batches = list(inputs.checked.batches())
    assert torch.equal(torch.cat([b.targets for b in batches]), inputs.source.samples.targets[:64])
    inputs = load_inputs(with_values(settings, eval_fraction=0.1))
    assert (len(inputs.checked.rows), len(inputs.source.samples)) == (7, 63)
    with pytest.raises(DataError, match="must name two fields of numbers"):
        load_inputs(with_values(settings, dataset_field=("x",)))
