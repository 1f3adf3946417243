from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.splits import find_files, parse_split, split_name
from disha.finetune.errors import DataError


def rows(text, count):
    """The names and numbers of the rows that a notation means."""
    return [(part.name, number) for part in parse_split(text) for number in part.of(range(count))]


def numbers(text, count):
    return [number for _, number in rows(text, count)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train", range(40)),
        ("train[:]", range(40)),
        ("train[:7]", range(7)),
        ("train[10:20]", range(10, 20)),
        ("train[30:]", range(30, 40)),
        ("train[-5:]", range(35, 40)),
        ("train[:-5]", range(35)),
        ("train[-10:-5]", range(30, 35)),
        ("train[:100000]", range(40)),
        ("train[:100_000]", range(40)),
        ("train[-100:3]", range(3)),
        ("train[20:10]", range(0)),
        ("train[:10%]", range(4)),
        ("train[10%:30%]", range(4, 12)),
        ("train[-5%:]", range(38, 40)),
        ("train[:2.5%]", range(1)),
        ("train[10:50%]", range(10, 20)),
        (" train [ 1 : 3 ] ", range(1, 3)),
    ],
)
def test_which_rows_are_meant(text, wanted):
    assert numbers(text, 40) == list(wanted)


def test_several_are_added_up_in_their_order():
    assert numbers("train[:10%]+train[90%:]", 20) == [0, 1, 18, 19]
    assert rows("test[:1] + train[1:2] + test[:1]", 3) == [("test", 0), ("train", 1), ("test", 0)]


@given(st.integers(0, 10_000), st.integers(0, 100))
def test_two_parts_at_one_percentage_share_no_row_and_leave_none_out(count, k):
    assert numbers(f"train[:{k}%]+train[{k}%:]", count) == list(range(count))


@given(st.integers(0, 10_000), st.lists(st.integers(0, 100), max_size=5))
def test_so_do_many_parts(count, cuts):
    bounds = [0, *sorted(cuts), 100]
    text = "+".join(f"a[{x}%:{y}%]" for x, y in pairwise(bounds))
    assert numbers(text, count) == list(range(count))


@given(st.integers(0, 10_000), st.integers(-100, 100))
def test_percentages_are_rounded_to_the_nearest_row(count, k):
    # As upstream's data library rounds them, but for its slip on what rounds to -0.
    edge = round(k * count / 100)
    if k < 0:
        edge += count
    assert numbers(f"train[:{k}%]", count) == list(range(edge))
    assert numbers(f"train[{k}%:]", count) == list(range(edge, count))


@given(st.integers(0, 50), st.integers(-80, 80), st.integers(-80, 80))
def test_rows_are_sliced_as_lists_are(count, start, end):
    assert numbers(f"train[{start}:{end}]", count) == list(range(count))[start:end]


def test_a_few_percent_of_few_rows_from_the_end_are_none_and_not_all():
    assert numbers("train[-5%:]", 9) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "train[", "train[10]", "train[1:2:3]", "train[a:]", "train[:1.5]", "train[1 0:]"),
        *("train[:10%](pct1_dropremainder)", "+train", "train++test", "train test", "[:3]"),
        f"train[:{'9' * 5000}]",
    ],
)
def test_other_notations_are_refused_with_those_allowed(text):
    with pytest.raises(DataError, match=r"is not a split; .* train\[:1000\], train\[10:20\]"):
        parse_split(text)


def test_usual_names():
    assert [split_name(name) for name in ("dev", "Val", "training", "testing", "mine")] == [
        "validation",
        "validation",
        "train",
        "test",
        "mine",
    ]


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


def test_a_link_to_another_folder_is_followed_and_each_file_comes_once(tmp_path):
    folder, elsewhere = tmp_path / "rows", tmp_path / "large-disk"
    for place in (folder / "more", elsewhere):
        place.mkdir(parents=True)
        (place / "part.jsonl").touch()
    (folder / "test").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "more")
    (elsewhere / "loop").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / ".hidden").symlink_to(elsewhere)
    (folder / "broken").symlink_to(tmp_path / "absent")
    assert find_files(folder) == {
        "train": [folder / "more" / "part.jsonl"],
        "test": [folder / "test" / "part.jsonl"],
    }


def test_an_empty_folder_is_named_with_what_it_should_hold(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"holds no data files; their names must end with \.jsonl"):
        find_files(tmp_path)


def test_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*absent"):
        find_files(tmp_path / "absent")
