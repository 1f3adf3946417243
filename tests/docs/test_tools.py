"""The page of other tools is that of the current tests."""

import ast

import pytest

from docs.tools import PAGE, ROOT, TABLES, TICK, render, results_of
from tests.distributed import deepspeed_zero
from tests.pages import tables_of
from tests.whole import test_distributed, test_transformers_parallel
from tests.whole.test_distributed import checks_in

SCRIPTS = {*test_distributed.SCRIPTS, *test_transformers_parallel.SCRIPTS, deepspeed_zero}


def test_the_page_is_that_of_tests_which_all_passed():
    everything = {test: True for table in TABLES for test in table.tests()}
    assert PAGE.read_text(encoding="utf-8") == render(everything), "run `python -m docs.tools`"


@pytest.mark.parametrize("test", sorted({test for table in TABLES for test in table.tests()}))
def test_every_test_exists(test):
    place, _, name = test.partition("::")
    module, _, owner = place.partition(".Test")
    tree = ast.parse((ROOT / "tests" / f"{module.replace('.', '/')}.py").read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions
    assert not owner or f"Test{owner}" in {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }


def test_every_check_of_ranks_exists():
    tests = [test for table in TABLES for test in table.tests() if "test_on_two_ranks[" in test]
    checks = [test.partition("[")[2].removesuffix("]") for test in tests]
    assert len(checks) > 20
    assert set(checks) <= set(checks_in(SCRIPTS))


def test_a_tick_needs_tests_that_ran_and_passed_in_each_form():
    training = TABLES[0]
    tests = training.rows["Trainer of transformers"]["quantised base"]
    for passed, cell in (
        ({f"{tests[0]}[a]": True, f"{tests[0]}[b]": True}, TICK),
        ({f"{tests[0]}[a]": True, f"{tests[0]}[b]": False}, ""),
        ({f"{tests[0]}_longer": True}, ""),
    ):
        header, first, *_ = tables_of(training.render(passed))[0]
        assert dict(zip(header, first, strict=True))["quantised base"] == cell


def test_reports_of_pytest(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_b[c]"/>'
        '<testcase classname="tests.test_a.TestD" name="test_e"><skipped/></testcase>'
        '<testcase classname="tests.test_a" name="test_f"><failure/></testcase>'
        "</testsuite></testsuites>"
    )
    assert results_of(report) == {
        "test_a::test_b[c]": True,
        "test_a.TestD::test_e": False,
        "test_a::test_f": False,
    }
