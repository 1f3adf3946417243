"""Groups as a candidate of the study: their update against slow loops, and the paired table."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.convergence.findings import all_finished
from benchmarks.convergence.groups import GROUPS
from benchmarks.convergence.methods import golay_sign
from benchmarks.convergence.plan import CANDIDATES, LONG, STUDY, main_cell
from benchmarks.convergence.runs import RESULTS, Run, read_runs
from benchmarks.convergence.tables import paired
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


def test_pairs_are_of_equal_seeds():
    finished = all_finished(KEPT)
    rows = paired(finished, KEPT).splitlines()
    (row,) = (row for row in rows if row.startswith("| MiSS, n groups - MiSS |"))
    cells = row.strip("| ").split(" | ")[1:]
    for cell, (task, found) in zip(cells, finished.items(), strict=True):
        gaps = []
        for seed in range(8):
            mine = KEPT.get(Run(main_cell(task, "groups_all"), found["groups_all"].rate, seed))
            ours = KEPT.get(Run(main_cell(task, "bone"), found["bone"].rate, seed))
            if mine and ours:
                gaps.append(mine["loss"] - ours["loss"])
        assert len(gaps) >= 3
        assert float(cell.split()[0]) == pytest.approx(sum(gaps) / len(gaps), abs=6e-4)


def test_candidates_of_the_longer_study_run_with_every_seed_at_their_first_rate():
    for name in CANDIDATES[LONG]:
        cell = main_cell(LONG, name)
        assert cell in STUDY.cells
        assert STUDY.seeds_of(cell) == STUDY.seeds
