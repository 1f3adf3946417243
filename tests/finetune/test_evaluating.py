from __future__ import annotations

import json
import math

import pytest

from disha.finetune.answering import Answerer
from disha.finetune.errors import SettingsError
from disha.finetune.evaluating import Measured, evaluate
from disha.finetune.scales import AtScale, best_scale
from disha.finetune.settings import EvaluateSettings, ModelSettings, RowSettings, SamplingSettings
from disha.finetune.text.templates import template_from
from tests.finetune.command_line import ROWS, adapter_of, report_of, write_rows

TOKENS = 6


def settings(model, data, **changes):
    of_data = {name: changes.pop(name) for name in list(changes) if hasattr(RowSettings, name)}
    return EvaluateSettings(
        model=ModelSettings(base_model_name_or_path=model),
        data=RowSettings(data_path=(data,), max_seq_length=100, **of_data),
        max_new_tokens=TOKENS,
        **changes,
    )


@pytest.fixture
def data(tmp_path, tiny_model, tiny_tokenizer):
    """Rows of queries of several lengths; the response of every second is the model's answer."""
    template = template_from("auto", tiny_tokenizer)
    asked = Answerer(
        tiny_model.eval(), tiny_tokenizer, template, SamplingSettings(max_new_tokens=TOKENS)
    )
    queries = [f"{word} {number}" for word in ("well", "hello", "w") for number in range(4)]
    rows = [
        {"query": query, "response": "".join(asked.answer(query)) if place % 2 else "never"}
        for place, query in enumerate(queries)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", [1, 5, 16])
def test_answers_that_are_exactly_right_are_counted(tiny_path, data, size):
    found = evaluate(settings(tiny_path, data, exact_match=True, per_device_eval_batch_size=size))
    assert (found.model.exact, found.tally.used) == (6, 12)
    assert found.base is None


@pytest.fixture
def usual(tmp_path, tiny_path):
    rows = write_rows(tmp_path / "eval.jsonl", ROWS[::4])
    return EvaluateSettings(
        ModelSettings(base_model_name_or_path=tiny_path),
        RowSettings(data_path=(rows,), max_seq_length=96),
        max_new_tokens=24,
    )


def changed(usual, **changes):
    return EvaluateSettings(**{**vars(usual), **changes})


@pytest.fixture
def trained(finetune, usual):
    """An adapter of a run that measured on the same rows."""
    finetune.good(max_steps=4, eval_path=usual.data.data_path[0])
    assert adapter_of(finetune.output)
    return finetune.output


def test_losses_are_those_of_the_run(usual, trained):
    adapter = trained / "adapter.safetensors"
    found = evaluate(changed(usual, adapter=adapter, compare=True))
    loss = report_of(trained)["loss"]
    assert found.model.loss == pytest.approx(loss["after"], abs=1e-5)
    assert found.base.loss == pytest.approx(loss["before"], abs=1e-5)
    assert found.model.perplexity == pytest.approx(math.exp(found.model.loss))
    assert found.tally.used == len(ROWS[::4])
    merged = evaluate(changed(usual, adapter=adapter, compare=True, merge=True))
    assert merged.model.loss == pytest.approx(found.model.loss, abs=1e-4)
    assert merged.base.loss == pytest.approx(found.base.loss, abs=1e-4)


def test_rows_may_share_batches_in_any_way(usual):
    one = evaluate(changed(usual, per_device_eval_batch_size=1)).model
    many = evaluate(usual).model
    assert one.loss == pytest.approx(many.loss, abs=1e-5)
    assert one.tokens == many.tokens


def test_a_model_without_a_tokenizer_is_refused(usual):
    model = ModelSettings(model="tests.finetune.factories:classifier")
    with pytest.raises(SettingsError, match="measures models of text"):
        evaluate(changed(usual, model=model))


def test_a_scale_whose_loss_is_no_number_is_not_the_best():
    found = [AtScale(9.0, math.nan, None), AtScale(1.0, 2.0, None), AtScale(2.0, 3.0, math.nan)]
    assert best_scale(found).scale == 1.0


def test_a_perplexity_beyond_numbers_is_infinite():
    assert Measured(800.0, 1, None).perplexity == math.inf
    assert Measured(0.0, 1, None).perplexity == 1
