"""The feature table in the docs is that of the current tests."""

from __future__ import annotations

import pytest

from disha.layers import LAYER_KINDS
from tests import feature_table, test_kinds, test_layouts
from tests.feature_table import PAGE, TABLES, Result, render

LAYERS = TABLES[0]


def tables_of(page):
    """Return the tables of a page of markdown, each as its lines of cells without the rule."""
    tables, lines = [], []
    for text in [*page.splitlines(), ""]:
        if text.startswith("|"):
            lines.append([cell.strip() for cell in text.strip("|").split("|")])
        elif lines:
            tables.append([lines[0], *lines[2:]])
            lines = []
    return tables


def test_the_page_has_the_rows_and_columns_of_the_tests():
    tables = tables_of(PAGE.read_text(encoding="utf-8"))
    assert len(tables) == len(TABLES)
    for (header, *rows), table in zip(tables, TABLES, strict=True):
        assert header == table.columns
        titles = feature_table.METHODS
        assert [(label, method) for label, method, *_ in rows] == [
            (label, titles.get(method, method)) for label, method in table.rows
        ], "run `python -m tests.feature_table`, which takes 15 minutes"
        for row in rows:
            assert all(row), f"run `python -m tests.feature_table`: {row}"


def test_the_page_says_what_the_zoo_found():
    assert PAGE.read_text(encoding="utf-8").endswith(feature_table.libraries())


def test_every_registered_kind_is_in_it():
    tried = [type(row.make()) for row in test_kinds.CASES.values()]
    tried += [type(row.make()) for row in test_layouts.TABLE.values()]
    for kind in LAYER_KINDS:
        if kind.__module__.startswith("torch."):
            assert any(issubclass(cls, kind) for cls in tried), kind


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.heading)
def test_every_column_is_of_a_test_that_exists(table):
    classes = [value for value in vars(table.module).values() if isinstance(value, type)]
    for function, _ in table.features.values():
        assert any(hasattr(cls, function) for cls in classes), function


def outcomes(**changed):
    """Return passed results for one linear layer, but for the functions that are given."""
    parameters = {"name": "linear", "method": "bone", "dtype": "torch.float32"}
    return [
        Result(test_kinds, function, parameters, changed.get(function, True))
        for function, _ in LAYERS.features.values()
    ]


def row_of(results):
    header, first, *_ = tables_of(render(results))[0]
    return dict(zip(header, first, strict=True))


def test_a_tick_needs_tests_that_ran_and_passed():
    assert row_of(outcomes())["forward"] == "✓"
    failed = row_of(outcomes(test_compiled_is_eager=False))
    assert (failed["compile"], failed["forward"], failed["dtypes"]) == ("", "✓", "")
    assert row_of(outcomes()[1:])["identity at injection"] == ""
    elsewhere = [
        Result(feature_table, result.function, result.parameters, passed=True)
        for result in outcomes()
    ]
    assert row_of(elsewhere)["forward"] == ""
