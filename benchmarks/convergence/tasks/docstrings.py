"""Language model: the demo's task, docstrings for functions of the standard library."""

from __future__ import annotations

from functools import lru_cache

from benchmarks.convergence.tasks.language import LanguageTask, Rows, encoded
from disha.finetune.demo import Pair, docstring_pairs

__all__ = ["Docstrings"]

LONGEST = 128
HELD_OUT, VALIDATION_ROWS, TEST_ROWS = 1000, 24, 48


class Docstrings(LanguageTask):
    """Docstrings of functions."""

    name = "docstrings"
    title = "Language model: docstrings"
    about = (
        "SmolLM2-135M learns to write the first paragraph of a docstring from the source of the "
        "function. Functions are from Python's standard library, as in the demo, and short enough "
        "for both to fit 128 tokens."
    )
    steps, batch, evaluate_every = 32, 4, 8

    def rows(self) -> Rows:
        """Return the demo's pairs that fit."""
        return _rows()


@lru_cache(maxsize=1)
def _rows() -> Rows:
    pairs = docstring_pairs()
    held_out, training = (
        [row for pair in part if len((row := _encoded(pair))[0]) <= LONGEST]
        for part in (pairs[:HELD_OUT], pairs[HELD_OUT:])
    )
    return Rows(
        training,
        held_out[:VALIDATION_ROWS],
        held_out[VALIDATION_ROWS : VALIDATION_ROWS + TEST_ROWS],
    )


def _encoded(pair: Pair) -> tuple[list[int], int]:
    return encoded(f"{pair.query}\n# Docstring:", f" {pair.response}")
