"""Language model: one-step word problems, made by a seeded generator."""

from __future__ import annotations

import random
from functools import cached_property

from benchmarks.convergence.tasks.language import LanguageTask, encoded
from benchmarks.convergence.tasks.task import Rows, held_out

TRAINING_ROWS, VALIDATION_ROWS, TEST_ROWS = 2000, 48, 128
NAMES = ("Ada", "Ben", "Ivo", "Mia", "Noor", "Tom")
THINGS = ("apples", "books", "coins", "eggs", "nuts", "stamps")


class Arithmetic(LanguageTask):
    """Sums, differences and products in words."""

    name = "arithmetic"
    title = "Language model: word problems"
    steps, batch, evaluate_every = 48, 12, 12

    @cached_property
    def rows(self) -> Rows:
        generator, problems = random.Random(0), dict[str, str]()
        while len(problems) < TRAINING_ROWS + VALIDATION_ROWS + TEST_ROWS:
            problems.update([word_problem(generator)])
        rows = [encoded(problem, answer) for problem, answer in problems.items()]
        return held_out(rows, VALIDATION_ROWS, TEST_ROWS)


def word_problem(generator: random.Random) -> tuple[str, str]:
    """Return a problem and its answer."""
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    kind = generator.choice(("sum", "difference", "product"))
    if kind == "product":
        a, b = generator.randint(2, 9), generator.randint(2, 9)
        return f"{name} has {a} bags of {b} {thing}. How many {thing}?", f" {a * b}"
    a, b = generator.randint(2, 99), generator.randint(2, 99)
    if kind == "sum":
        return f"{name} has {a} {thing} and gets {b}. How many {thing}?", f" {a + b}"
    a, b = max(a, b), min(a, b)
    return f"{name} has {a} {thing} and loses {b}. How many {thing}?", f" {a - b}"
