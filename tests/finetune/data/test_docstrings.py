from __future__ import annotations

import ast
import shutil
import sysconfig
from pathlib import Path

import pytest

from disha.finetune.data.docstrings import docstring_pairs
from disha.finetune.errors import DataError

SOURCE = '''
import os


class Box:
    @property
    def size(self):
        """Return how large the box is,
        in cubic metres.

        And more that is not wanted.
        """
        # measured once
        return self._size

    async def fill(self, amount: int) -> None:
        "Fill the box, as far as there is room."
        await self.pour(amount)

    def undocumented(self):
        return 1

    def only_a_docstring(self):
        """Subclasses must say what this does."""

    def terse(self):
        """Terse."""
        return 2
'''


@pytest.fixture(scope="module")
def pairs():
    return docstring_pairs()


def library(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return tmp_path


def test_about_six_thousand_pairs_of_which_256_are_held_out(pairs):
    assert len(pairs.held_out) == 256
    assert 5000 <= len(pairs.training) + len(pairs.held_out) <= 6000


def test_the_split_shares_neither_source_nor_docstring(pairs):
    for field in ("query", "response"):
        held_out = {pair[field] for pair in pairs.held_out}
        assert held_out.isdisjoint(pair[field] for pair in pairs.training)
        assert len(held_out) == 256


def test_the_same_pairs_in_the_same_order_wherever_they_are_found(tmp_path):
    source = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    files = sorted(source.glob("*.py"))
    for number, path in enumerate(reversed(files)):
        shutil.copy(path, tmp_path / f"{number:03}.py")
    first, again, copied = (
        docstring_pairs(folder, held_out=20) for folder in (source, source, tmp_path)
    )
    assert len(first.training) > 50
    for made in (again, copied):
        assert list(made.training) == list(first.training)
        assert list(made.held_out) == list(first.held_out)


def test_sources_are_functions_that_parse_and_do_not_hold_their_docstring(pairs):
    for pair in pairs.held_out:
        (function,) = ast.parse(pair["query"]).body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        docstring = " ".join((ast.get_docstring(function) or "").split())
        assert not docstring.startswith(pair["response"])


def test_source_and_first_paragraph(tmp_path):
    made = docstring_pairs(library(tmp_path, box=SOURCE), held_out=1)
    size = (
        "def size(self):\n    # measured once\n    return self._size",
        "Return how large the box is, in cubic metres.",
    )
    fill = (
        "async def fill(self, amount: int) -> None:\n    await self.pour(amount)",
        "Fill the box, as far as there is room.",
    )
    rows = [*made.training, *made.held_out]
    assert {(row["query"], row["response"]) for row in rows} == {size, fill}


def test_repeated_sources_and_docstrings_are_left_out(tmp_path):
    one = 'def {}(x):\n    """{}"""\n    return x{}\n'
    folder = library(
        tmp_path,
        a=one.format("f", "Return the value given.", ""),
        b=one.format("f", "Return the value given.", ""),
        c=one.format("g", "RETURN the value given.", " + 1"),
        d=one.format("f", "Return what was passed in.", ""),
        e=one.format("h", "Return one more than given.", " + 1"),
    )
    made = docstring_pairs(folder, held_out=1)
    assert len(made.training) + len(made.held_out) == 2


def test_broken_files_and_tests_are_passed_over(tmp_path):
    library(tmp_path, box=SOURCE, broken="def f(:")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "test").mkdir()
    library(
        tmp_path / "test", more='def t(x):\n    """Return what a test wants."""\n    return x\n'
    )
    made = docstring_pairs(tmp_path, held_out=1)
    assert len(made.training) + len(made.held_out) == 2


def test_too_small_a_library_is_named(tmp_path):
    with pytest.raises(DataError, match=r"found 2 functions .* more than the 256 to hold out"):
        docstring_pairs(library(tmp_path, box=SOURCE))


def test_a_form_feed_shifts_no_lines(tmp_path):
    plain = docstring_pairs(library(tmp_path, box=SOURCE), held_out=1)
    paged = docstring_pairs(library(tmp_path, box="import re\n\x0c\n" + SOURCE), held_out=1)
    assert list(paged.training) == list(plain.training)
