"""Language model: the demo's task, docstrings for functions of the standard library."""

from __future__ import annotations

from functools import cached_property

from benchmarks.convergence.tasks.language import LanguageTask, Row, encoded
from benchmarks.convergence.tasks.task import Rows, held_out
from docs.demo import Pair, docstring_pairs

LONGEST = 128
HELD_OUT, VALIDATION_ROWS, TEST_ROWS = 1000, 24, 48


class Docstrings(LanguageTask):
    """Docstrings of functions: the demo's pairs that fit."""

    name = "docstrings"
    title = "Language model: docstrings"
    steps, batch, evaluate_every = 32, 4, 8

    @cached_property
    def rows(self) -> Rows:
        pairs = docstring_pairs()
        first, others = (
            [row for row in map(_encoded, part) if len(row[0]) <= LONGEST]
            for part in (pairs[:HELD_OUT], pairs[HELD_OUT:])
        )
        return held_out(first, VALIDATION_ROWS, TEST_ROWS)._replace(training=others)


def _encoded(pair: Pair) -> Row:
    return encoded(f"{pair.query}\n# Docstring:", f" {pair.response}")
