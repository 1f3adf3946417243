from __future__ import annotations

import pytest

from disha.finetune.data.folders import find_files
from disha.finetune.errors import DataError


def found(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return {
        split: [str(file.relative_to(tmp_path)) for file in files]
        for split, files in find_files(tmp_path).items()
    }


def test_files_belong_to_the_split_that_their_name_says(tmp_path):
    names = ["train.jsonl", "train_2.jsonl", "training-b.csv", "test-00000-of-00001.parquet"]
    names += ["validation.csv", "Dev.txt", "val2.jsonl.gz", "testimonials.jsonl", "other.json"]
    assert found(tmp_path, *names) == {
        "train": [
            "other.json",
            "testimonials.jsonl",
            "train.jsonl",
            "train_2.jsonl",
            "training-b.csv",
        ],
        "test": ["test-00000-of-00001.parquet"],
        "validation": ["Dev.txt", "val2.jsonl.gz", "validation.csv"],
    }


def test_or_the_folder_around_it(tmp_path):
    names = ["data/test/a.jsonl", "data/b.jsonl", "val/deep/c.jsonl", "test/train.jsonl"]
    assert found(tmp_path, *names) == {
        "train": ["data/b.jsonl", "test/train.jsonl"],
        "test": ["data/test/a.jsonl"],
        "validation": ["val/deep/c.jsonl"],
    }


def test_shards_belong_to_any_split(tmp_path):
    names = ["data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet"]
    assert found(tmp_path, *names, "data/train-00000-of-00001.parquet") == {
        "train": ["data/train-00000-of-00001.parquet"],
        "train_sft": names,
    }


def test_other_and_hidden_files_are_passed_over(tmp_path):
    names = ["README.md", ".cache/a.jsonl", ".hidden.jsonl", "LICENSE", "a.jsonl"]
    (tmp_path / "folder.csv").mkdir()
    assert found(tmp_path, *names) == {"train": ["a.jsonl"]}


def test_a_file_is_training_data_and_what_its_name_says(tmp_path):
    for name, splits in [("rows.jsonl", {"train"}), ("test.jsonl", {"train", "test"})]:
        path = tmp_path / name
        path.touch()
        assert find_files(path) == {split: [path] for split in splits}


def test_an_empty_folder_is_named_with_what_it_should_hold(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"holds no data files; their names must end with \.jsonl"):
        find_files(tmp_path)


def test_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*absent"):
        find_files(tmp_path / "absent")
