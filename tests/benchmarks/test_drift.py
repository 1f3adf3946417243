"""The benchmark of drift."""

from benchmarks.drift import KINDS, main
from benchmarks.results import read_results


def test_a_base_that_is_merged_and_unmerged_does_not_drift(tmp_path):
    main(["--cycles", "3", "--folder", str(tmp_path)])
    cases = read_results(tmp_path / "drift.json")["tables"]["drift"]
    assert len(cases) == 2 * len(KINDS)
    assert {case["kind"] for case in cases if case["changed"] == 0} == {"disha (MiSS)"}
    assert "PEFT LoRA" in (tmp_path / "drift.md").read_text()
