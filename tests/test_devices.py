"""The paths for devices, on one that only pretends to be one: see `benchmarks.devices`.

It is a backend of torch, which stays in its process, so the checks run in a process of their own.
"""

import pytest
import torch

from benchmarks.devices import FACTS, NOT_ASKED, devices
from benchmarks.layouts import LAYOUTS
from benchmarks.settings import QUICK
from tests.conftest import once

BY_DESIGN = {
    # The host needs to know how many rows each expert has.
    ("experts, grouped", "bat", "unsynchronised"): "aten._to_copy.default",
}


@pytest.fixture(scope="module")
def found(shared_folder):
    _, cases = once(shared_folder, "devices", lambda _: devices(QUICK, torch.device("cpu")))
    return {(case["layout"], case["method"]): case["facts"] for case in cases}


def test_every_layout_is_tried_with_both_methods(found):
    assert set(found) == {(layout, method) for layout in LAYOUTS for method in ("bone", "bat")}
    for (layout, _), facts in found.items():
        not_asked = {fact for fact, broken in facts.items() if broken == NOT_ASKED}
        whole = LAYOUTS[layout]
        asked = {"routed": whole.routes, "compiled": whole.compiles}
        assert not_asked == {fact for fact, does in asked.items() if not does}


@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_holds_but_for_what_waits_by_design(found, fact):
    broken = {
        (*pair, fact): facts[fact]
        for pair, facts in found.items()
        if facts[fact] not in ("", NOT_ASKED)
    }
    assert broken == {case: why for case, why in BY_DESIGN.items() if case[-1] == fact}
