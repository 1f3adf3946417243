import pytest
import torch
import torch.nn.functional as F

import disha
from disha.finetune.base import load_base
from disha.finetune.forgetting import SEED, Point, Scales, advise, own_text, plot
from tests.conftest import perturb


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


def test_forgetting_is_that_of_slow_loops(base):
    model, tokenizer = base
    model.generation_config.eos_token_id = list(range(200))  # what ends answers ends no text
    usual, state = model.generation_config, torch.get_rng_state()
    own = own_text(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is usual
    with torch.no_grad():
        assert own.texts == slow_text(model, tokenizer.bos_token_id, 32, 64, SEED)
        before = slow_loss(model, own.texts)
        perturb(disha.inject_adapters(model, "all-linear", r=4, scale=2.0))
        rise = slow_loss(model, own.texts) - before
        assert own.forgotten(model) == pytest.approx(rise, abs=1e-5)
        assert rise > 0.01
        scales = Scales(model)
        scales.set(0)
        assert own.forgotten(model) == pytest.approx(0, abs=1e-6)
        scales.set(1)
        assert own.forgotten(model) == pytest.approx(rise, abs=1e-5)


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
