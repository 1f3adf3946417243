"""Write docs/features.md from the tests: a feature is ticked where its tests ran and passed.

    python -m tests.feature_table

Rows are cases of the tests, and columns are tests. So the page lists nothing that is not tested.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import test_attention, test_kinds, test_layouts, test_quantised, test_whole_models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "features.md"
ZOO = ROOT / "benchmarks" / "results" / "zoo.json"

Feature = tuple[str, dict[str, Any]]
"""A test function's name, and the parameters that its tests must have to count."""

METHODS = {"bone": "Bone", "tile": "tile", "bat": "BAT"}

QUANTISATIONS = {
    "8-bit": "bitsandbytes 8-bit",
    "nf4": "bitsandbytes nf4",
    "fp4": "bitsandbytes fp4",
    "torchao": "torchao int8",
}

INTRODUCTION = """\
# What works where

These tables show which features work for which layers and models. Look here for your layer or your
model. ✓ means that every test of the feature ran and passed for that row, in every variant and
dtype. An empty cell means that a test failed or does not exist. `python -m tests.feature_table`
writes this page from the tests; do not edit it.
"""

LAYERS = """\
## Layer kinds

Subclasses of these classes work too, and keep their own forward. `disha.register_layer_kind` adds
more kinds.
"""

LAYOUTS = """\
## Layouts

This table has every layout with every method, in modules that use the weight in different ways.
*Routing* means that each sample can have its own adapter, or that this is refused because one
weight serves the whole batch.
"""

ATTENTION = """\
## Attention

This table is for `nn.MultiheadAttention`, with all four projections adapted.
"""

QUANTISED = """\
## Quantised linear layers

*Dense merge* means that the layer computes with a merged weight in full precision until it is
unmerged.
"""

MODELS = """\
## Whole models

These models are tiny and have random weights. Every possible layer is adapted. *Trains* means that
the block of every layer has changed after three steps.
"""

LIBRARIES = """\
## Whole libraries

`make zoo` builds a small random model of each architecture in {libraries}.
It adapts every possible layer and runs the model. Then it merges, unmerges, saves, removes and
loads the adapter. Of {ran} architectures, {held} pass. The other {refused} refuse one step and say
why: a weight under a parametrization can't be merged. Every adapter acted, and none gave a wrong
result. Another {not_run} architectures do not run in a small form.
"""


@dataclass(frozen=True)
class Result:
    """What became of one test: its module, function and parameters, and whether it passed."""

    module: ModuleType
    function: str
    parameters: dict[str, Any]
    passed: bool


class Recorder:
    """A plugin of pytest that keeps the result of every test with parameters."""

    def __init__(self) -> None:
        self._items: dict[str, pytest.Function] = {}
        self._passed: dict[str, list[bool]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._items = {item.nodeid: item for item in session.items if hasattr(item, "callspec")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._passed.setdefault(report.nodeid, []).append(report.passed)

    @property
    def results(self) -> list[Result]:
        """The results; a test that was skipped, or never ran its three phases, did not pass."""
        return [
            Result(
                item.module,
                item.originalname,
                dict(item.callspec.params),
                passed=self._passed.get(nodeid) == [True, True, True],
            )
            for nodeid, item in self._items.items()
        ]


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        module: the test module.
        text: what stands above the table.
        heading: the name of the first column.
        label: returns the row of a case, by the case's name.
        pairs: (case, method), in the order of the rows.
        features: column -> the test that shows it, with the parameters that matter.
        extra: column -> what makes its text of a row's results.
        case: the parameter of the tests that names the case.
    """

    module: ModuleType
    text: str
    heading: str
    label: Callable[[str], str]
    pairs: list[tuple[str, str]]
    features: dict[str, Feature]
    extra: dict[str, Callable[[list[Result]], str]] = field(default_factory=dict)
    case: str = "name"

    @property
    def columns(self) -> list[str]:
        """The heads of the columns."""
        return [self.heading, "method", *self.features, *self.extra]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The label and method of each row, in the order of the cases."""
        return list(dict.fromkeys((self.label(name), method) for name, method in self.pairs))

    def render(self, results: Iterable[Result]) -> str:
        """Return the text and the table as markdown."""
        by_row: dict[tuple[str, str], list[Result]] = {row: [] for row in self.rows}
        for result in results:
            pair = result.parameters.get(self.case), result.parameters.get("method")
            if result.module is self.module and pair in self.pairs:
                by_row[self.label(pair[0]), pair[1]].append(result)
        lines = [line(self.columns), line(["---", "---", *[":-:"] * (len(self.columns) - 2)])]
        for (label, method), found in by_row.items():
            ticks = ["✓" if passed(found, feature) else "" for feature in self.features.values()]
            texts = [text(found) for text in self.extra.values()]
            lines.append(line([label, METHODS.get(method, method), *ticks, *texts]))
        return "\n".join([self.text, *lines]) + "\n"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def passed(results: list[Result], feature: Feature) -> bool:
    """Return whether the tests of a feature ran and all passed."""
    function, parameters = feature
    found = [
        result.passed
        for result in results
        if result.function == function and parameters.items() <= result.parameters.items()
    ]
    return bool(found) and all(found)


def class_name(module: str, name: str) -> str:
    """Return how a table calls a class: its name, with its package."""
    package = module.partition(".")[0]
    return f"`{'nn' if package == 'torch' else package}.{name}`"


def layer_name(case: str) -> str:
    """Return the class that a case of tests/test_kinds.py is of."""
    cls = type(test_kinds.CASES[case].make())
    return class_name(cls.__module__, cls.__name__)


def layout_name(case: str) -> str:
    """Return a row of tests/test_layouts.py with the class of its module."""
    cls = type(test_layouts.TABLE[case].make())
    own = cls.__module__ == test_layouts.__name__
    return case if own else f"{case}: {class_name(cls.__module__, cls.__name__)}"


def dtypes(results: list[Result]) -> str:
    """Return the dtypes in which everything passed."""
    by_dtype: dict[str, list[bool]] = {}
    for result in results:
        if "dtype" in result.parameters:
            name = str(result.parameters["dtype"]).removeprefix("torch.")
            by_dtype.setdefault(name, []).append(result.passed)
    return ", ".join(sorted(name for name, every in by_dtype.items() if all(every)))


def feature(function: str, **parameters: Any) -> Feature:
    return function, parameters


TABLES = (
    Table(
        test_kinds,
        LAYERS,
        "layer",
        layer_name,
        test_kinds.PAIRS,
        {
            "identity at injection": feature("test_injection_changes_no_bit"),
            "forward": feature("test_forward_is_that_of_the_dense_weight"),
            "gradients": feature("test_gradients_are_those_of_the_dense_weight"),
            "merge, exact unmerge": feature("test_merged_is_unmerged_and_comes_back_bit_for_bit"),
            "save, load": feature("test_file_round_trip_gives_equal_outputs"),
            "removal": feature("test_removal_restores"),
            "several adapters": feature("test_several_adapters_add_up_and_switch_off"),
            "routing": feature("test_routing_equals_running_the_samples_one_by_one_or_is_refused"),
            "dropout": feature("test_dropout_acts_in_training_only_and_is_unbiased"),
            "compile": feature("test_compiled_is_eager"),
            "copy, pickle": feature("test_copies_compute_the_same"),
        },
        {"dtypes": dtypes},
    ),
    Table(
        test_layouts,
        LAYOUTS,
        "layout",
        layout_name,
        test_layouts.PAIRS,
        {
            "identity at injection": feature("test_injection_changes_no_bit"),
            "forward": feature("test_forward_is_that_of_the_dense_weight"),
            "gradients": feature("test_gradients_are_those_of_the_dense_weight"),
            "merge, exact unmerge": feature("test_merged_is_unmerged_and_comes_back_bit_for_bit"),
            "save, load": feature("test_file_round_trip_gives_equal_outputs"),
            "removal": feature("test_removal_restores"),
            "several adapters": feature("test_several_adapters_add_up_and_switch_off"),
            "routing": feature("test_routing_equals_running_the_samples_one_by_one_or_is_refused"),
            "compile": feature("test_compiled_once_whatever_changes"),
            "export": feature("test_exported_is_eager"),
            "FSDP2": feature("test_fully_sharded"),
            "copy, pickle": feature("test_copies_compute_the_same"),
        },
        {"dtypes": dtypes},
    ),
    Table(
        test_attention,
        ATTENTION,
        "form",
        str,
        test_attention.PAIRS,
        {
            "identity at injection": feature("test_injection_changes_no_bit"),
            "forward": feature("test_forward_is_that_of_the_dense_merged_weight"),
            "masks, weights, modes": feature("test_masks_and_modes"),
            "gradients": feature("test_gradients_are_those_of_the_dense_merged_weight"),
            "merge, exact unmerge": feature("test_merged_is_unmerged_and_comes_back_bit_for_bit"),
            "save, load": feature("test_file_round_trip_gives_equal_outputs"),
            "removal": feature("test_removal_restores"),
            "several adapters": feature("test_several_adapters_add_up_and_switch_off"),
            "routing": feature("test_routing_equals_running_the_samples_one_by_one"),
            "dropout": feature("test_dropout_acts_in_training_only"),
            "compile": feature("test_compiled_is_eager"),
            "copy, pickle": feature("test_copies_compute_the_same"),
        },
        {"dtypes": dtypes},
    ),
    Table(
        test_quantised,
        QUANTISED,
        "weight",
        QUANTISATIONS.__getitem__,
        [(way, method) for way in test_quantised.WAYS for method in test_quantised.METHODS],
        {
            "identity at injection": feature("test_injection_changes_no_bit"),
            "forward": feature("test_forward_is_that_of_the_dense_merged_weight"),
            "gradients": feature("test_gradients_of_block_and_input"),
            "training lowers the loss": feature("test_training_lowers_the_loss"),
            "dense merge, exact unmerge": feature(
                "test_dense_merge_computes_the_same_and_comes_back_bit_for_bit"
            ),
            "save, load": feature("test_file_round_trip_onto_a_freshly_quantised_base"),
            "removal": feature("test_removal_restores"),
            "several adapters": feature("test_several_adapters_add_up_and_can_be_disabled"),
            "routing": feature("test_routing_is_running_samples_one_by_one"),
            "copy": feature("test_copies"),
        },
        case="way",
    ),
    Table(
        test_whole_models,
        MODELS,
        "model",
        str,
        test_whole_models.PAIRS,
        {
            "identity at injection": feature("test_injection_changes_nothing"),
            "trains": feature("test_every_block_moves", mode="train"),
            "trains in eval mode": feature("test_every_block_moves", mode="eval"),
            "all modes agree": feature("test_every_mode_sees_the_adapter"),
            "save, load": feature("test_file_into_a_fresh_base_gives_equal_outputs"),
            "merge, exact unmerge": feature("test_merged_is_unmerged_and_comes_back_bit_for_bit"),
            "removal": feature("test_removal_restores"),
        },
    ),
)


def render(results: list[Result]) -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *(table.render(results) for table in TABLES), libraries()])


def libraries() -> str:
    """Return what the kept results of `make zoo` say."""
    results = json.loads(ZOO.read_text(encoding="utf-8"))["results"]
    statuses = Counter(result["status"] for result in results)
    assert statuses.keys() == {"held", "refused", "not run"}
    names = sorted({f"`{result['library']}`" for result in results})
    return LIBRARIES.format(
        libraries=f"{', '.join(names[:-1])} and {names[-1]}",
        ran=len(results) - statuses["not run"],
        held=statuses["held"],
        refused=statuses["refused"],
        not_run=statuses["not run"],
    )


def main() -> int:
    """Run the tests and write the page; return the exit status of pytest."""
    recorder = Recorder()
    files = [str(table.module.__file__) for table in TABLES]
    status = int(pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder]))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(recorder.results), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
