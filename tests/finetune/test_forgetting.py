import json

import pytest
import torch
import torch.nn.functional as F

import disha
from disha.finetune.base import load_base
from disha.finetune.forgetting import OWN_TEXT, Point, Scales, advise, own_text, plot
from tests.conftest import perturb
from tests.finetune.tiny_models import write_model


@pytest.fixture
def base(tiny):
    return load_base(str(tiny))


def slow_text(model, start, texts, tokens, seed):
    """Texts from all probabilities, one token after another, and no end."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((texts, 1), start)
    for _ in range(tokens):
        likely = model(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
        rows = torch.cat((rows, torch.multinomial(likely, 1, generator=generator)), dim=1)
    return rows.tolist()


def slow_loss(model, texts):
    losses = []
    for text in texts:
        logits = model(input_ids=torch.tensor([text])).logits[0]
        for place, token in enumerate(text[1:]):
            losses.append(float(F.cross_entropy(logits[place], torch.tensor(token))))
    return sum(losses) / len(losses)


def test_forgetting_is_that_of_slow_loops(base, tmp_path):
    model, tokenizer = base
    model.generation_config.eos_token_id = list(range(200))  # what ends answers ends no text
    torch.manual_seed(1)  # the process's own, which the text does not depend on
    usual, state = model.generation_config, torch.get_rng_state()
    own = own_text(model, tokenizer, tmp_path / OWN_TEXT)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is usual
    with torch.no_grad():
        assert own.texts == slow_text(model, tokenizer.bos_token_id, 32, 64, own.seed)
        before = slow_loss(model, own.texts)
        assert own.loss == pytest.approx(before, abs=1e-5)
        perturb(disha.inject_adapters(model, "all-linear", r=4, scale=2.0))
        rise = slow_loss(model, own.texts) - before
        assert own.forgotten(model) == pytest.approx(rise, abs=1e-5)
        assert rise > 0.01
        scales = Scales(model)
        scales.set(0)
        assert own.forgotten(model) == pytest.approx(0, abs=1e-6)
        scales.set(1)
        assert own.forgotten(model) == pytest.approx(rise, abs=1e-5)


def test_the_text_of_another_base_is_written_again(base, tmp_path):
    model, tokenizer = base
    first = own_text(model, tokenizer, tmp_path / OWN_TEXT)
    note = json.loads((tmp_path / OWN_TEXT).read_text())
    kept = {**note, "texts": [*reversed(note["texts"])]}
    (tmp_path / OWN_TEXT).write_text(json.dumps(kept))
    assert own_text(model, tokenizer, tmp_path / OWN_TEXT).texts == kept["texts"]
    for sizes in ({"seed": 1}, {"vocab_size": 280}):
        other, _ = load_base(str(write_model(tmp_path / "other", initializer_range=0.1, **sizes)))
        again = own_text(other, tokenizer, tmp_path / OWN_TEXT)
        assert again.texts not in (first.texts, kept["texts"])
        assert json.loads((tmp_path / OWN_TEXT).read_text())["texts"] == again.texts


@pytest.mark.parametrize(
    ("smaller", "says"),
    [
        ([Point(0.75, 0.09, 2.01), Point(0.5, 0.04, 2.1)], "scaled to 0.75, its forgetting goes"),
        ([Point(0.9, 0.19, 2.0), Point(0.8, 0.18, 2.04)], "from 0.200 to 0.180"),
    ],
)
def test_the_largest_scale_that_forgets_half_is_named(smaller, says):
    points = [Point(1.0, 0.2, 2.0), *smaller]
    assert says in advise(points)
    [axes] = plot(points).axes
    assert list(axes.lines[0].get_xdata()) == [point.forgetting for point in sorted(points)]
