"""The benchmark of drift."""

from benchmarks.drift import KINDS, main
from benchmarks.results import read_results


def test_a_base_that_is_merged_and_unmerged_does_not_drift(tmp_path, capsys):
    main(["--cycles", "3", "--out", str(tmp_path / "drift.json")])
    cases = read_results(tmp_path / "drift.json")["tables"]["drift"]
    assert len(cases) == 2 * len(KINDS)
    assert {case["kind"] for case in cases if case["changed"] == 0} == {"disha (MiSS)"}
    assert "PEFT LoRA" in capsys.readouterr().out
