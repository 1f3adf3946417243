"""Names in files of flags that mean one thing only."""

from __future__ import annotations

import pytest

from disha.cli.config_file import arguments_in
from disha.errors import ArgumentError


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bone_r: 8\nbone-r: 16\n", "holds bone_r twice, with a dash and without"),
        ("bone_r: 8\nbone_r: 16\n", "is not YAML: it holds bone_r twice"),
        ("config: other.yaml\n", "names another file of flags in turn"),
    ],
)
def test_what_could_mean_two_things_is_refused(tmp_path, text, complaint):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=complaint):
        arguments_in(path, {"bone_r", "config"})


def test_what_is_merged_into_a_mapping_may_be_replaced(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("<<: {bone_r: 8}\nbone_r: 16\n")
    assert arguments_in(path, {"bone_r"}) == ["--bone_r", "16"]
