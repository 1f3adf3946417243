"""Groups as a candidate of the study: their update against slow loops, and what the page says."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.convergence.groups import GROUPS
from benchmarks.convergence.groups_report import (
    Outcome,
    decided,
    decision_of,
    findings_of,
    outcomes,
    section,
)
from benchmarks.convergence.methods import golay_sign
from benchmarks.convergence.plan import CANDIDATES, LONG, STUDY, main_cell
from benchmarks.convergence.runs import RESULTS, Run, read_runs
from disha.functional import Layout, Update, adapted_linear

KEPT = read_runs(RESULTS)
OF_MISS = [name for name in GROUPS if not name.startswith("bat")]


def slow_update(name, block, in_features):
    """Return dW by its definition, entry by entry."""
    r, outputs = block.shape
    number, _, rest = name.removeprefix("groups").partition("_")
    groups = min(int(number or outputs), math.ceil(in_features / r), outputs)
    update = torch.zeros(outputs, in_features)
    for o in range(outputs):
        group = o // math.ceil(outputs / groups) if rest.endswith("contiguous") else o % groups
        for i in range(in_features):
            if i // r % groups == group:
                update[o, i] = block[i % r, o]
    return update


@pytest.mark.parametrize("name", OF_MISS)
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 12), (22, 13), (64, 9)])
def test_the_update_is_that_of_the_definition(name, inputs, outputs):
    _, method = GROUPS[name]
    block = torch.randn(4, outputs)
    expected = slow_update(name, block, inputs)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(5, inputs)
    assert torch.equal(method.delta_weight(Layout("out in"), block, weight), expected)
    output = adapted_linear(x, weight, bias, [Update(method, block, 0.5)])
    torch.testing.assert_close(output, F.linear(x, weight + 0.5 * expected, bias))


def test_fixed_signs_are_those_of_golay_rudin_and_shapiro():
    assert [golay_sign(place) for place in range(8)] == [1, 1, 1, -1, 1, 1, -1, 1]


def test_an_outcome_compares_equal_seeds_with_miss():
    tasks = findings_of(STUDY, KEPT)
    for task, outcome in outcomes(tasks, "n groups", KEPT).items():
        gaps = []
        for seed in range(8):
            mine = KEPT.get(Run(main_cell(task, outcome.method), outcome.rate, seed))
            ours = KEPT.get(Run(main_cell(task, "bone"), tasks[task]["bone"].rate, seed))
            if mine and ours:
                gaps.append(mine["loss"] - ours["loss"])
        assert len(gaps) >= 3
        assert outcome.gap == pytest.approx(sum(gaps) / len(gaps))


def test_a_page_without_runs_of_groups_names_what_is_not_finished():
    without = {run: one for run, one in KEPT.items() if run.cell.method not in GROUPS}
    page, told = section(STUDY, without), decided(STUDY, without)
    assert "Not run to the end" in page
    assert "no groups are added to the library" in told
    assert "- *documentation*: MiSS, 3 groups; MiSS, n groups; MiSS, 3 groups, contiguous" in page
    assert "in 0 of 0 tasks" in told


@pytest.mark.parametrize(
    ("clear_gaps", "accepted"),
    [((-0.1, -0.1, -0.1), True), ((-0.1, -0.1), False), ((-0.1, -0.1, -0.1, 0.1), False)],
)
def test_a_rule_needs_three_better_tasks_and_no_worse_one(clear_gaps, accepted):
    of_rule = {
        f"task {number}": Outcome("groups_all", gap, True, 1e-3, 1e-3)
        for number, gap in enumerate(clear_gaps)
    }
    of_rule["unclear"] = Outcome("groups_all", 0.1, False, 1e-3, 1e-3)
    assert ("n groups are in the library" in decision_of({"n groups": of_rule})) is accepted


def test_candidates_of_the_longer_study_run_with_every_seed():
    for name in CANDIDATES[LONG]:
        cell = main_cell(LONG, name)
        assert cell in STUDY.cells
        counts = [count for (other, _), count in STUDY.repeated.items() if other == cell]
        assert set(counts) <= {len(STUDY.seeds)}
