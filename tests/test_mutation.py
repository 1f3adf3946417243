"""Mutants are counted by module and outcome."""

from tests.mutation import counts

RESULTS = """
    disha.inject.x_inject_adapters__mutmut_1: killed
    disha.inject.x_inject_adapters__mutmut_4: survived
    disha.functional.methods.xǁBoneǁshape__mutmut_7: killed
    disha.inject.x__undo__mutmut_11: killed
"""


def test_counts():
    assert counts(RESULTS) == {
        ("disha.inject", "killed"): 2,
        ("disha.inject", "survived"): 1,
        ("disha.functional.methods", "killed"): 1,
    }
