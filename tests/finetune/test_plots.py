from __future__ import annotations

import io

from PIL import Image

from disha.finetune.plots import learning_rate_plot, loss_plot
from disha.finetune.training.loop import Step

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
STEPS = [
    Step(number, 1, 3.0 / number, 1e-3 / number, 1.5, 40, 200.0, 0.2 * number, None)
    for number in range(1, 30)
]


def colours(png):
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width >= 800
    return {colour: count for count, colour in picture.getcolors(maxcolors=2**24)}


def test_the_plot_of_losses_has_both_curves():
    found = colours(loss_plot(STEPS, {0: 3.5, 15: 2.0, 29: 1.0}, "a title", "held-out"))
    assert {BLUE, ORANGE} <= found.keys()


def test_one_step_is_enough():
    assert BLUE in colours(loss_plot(STEPS[:1], {0: 3.5, 1: 3.0}, "a title", "held-out"))
    assert BLUE in colours(learning_rate_plot(STEPS[:1], "a title"))


def test_the_plot_of_learning_rates_has_gradient_norms_too():
    found = colours(learning_rate_plot(STEPS, "a title"))
    greys = sum(count for (r, g, b), count in found.items() if r == g == b and 150 < r < 220)
    assert found[BLUE] > 100
    assert greys > 100
