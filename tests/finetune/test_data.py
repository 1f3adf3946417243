import gzip

import datasets
import pytest

from disha import ArgumentError
from disha.finetune.data import load_rows, mix_rows
from disha.finetune.forms import form_rows
from tests.finetune.tiny_models import tokenizer, write_rows

PAIR = {"query": "say two", "response": "two"}
UNCHANGED = {"query": "2030-01-31", "response": "007", "more": "NA"}  # no date, number or gap


class TestFiles:
    def write(self, folder, ending):
        rows, path = datasets.Dataset.from_list([UNCHANGED] * 3), folder / f"rows{ending}"
        if ending == ".parquet":
            rows.to_parquet(path)
        elif ending in (".csv", ".tsv"):
            rows.to_csv(path, sep="\t" if ending == ".tsv" else ",")
        elif ending == ".txt":
            path.write_text("one\n\ntwo\n \nthree\n")  # blank lines are no rows
        else:
            gz = "gzip" if ending.endswith("gz") else None
            rows.to_json(path, lines=ending != ".json", compression=gz)
        return path

    @pytest.mark.parametrize(
        "ending", [".json", ".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt"]
    )
    def test_kinds(self, tmp_path, ending):
        rows = load_rows(str(self.write(tmp_path, ending)))
        assert len(rows) == 3
        assert rows[1] == ({"text": "two"} if ending == ".txt" else UNCHANGED)

    def test_a_file_of_the_folder_in_which_one_is(self, tmp_path, monkeypatch):
        self.write(tmp_path, ".jsonl")
        monkeypatch.chdir(tmp_path)
        assert len(load_rows("rows.jsonl")) == 3

    def test_globs_folders_and_splits(self, tmp_path):
        self.write(tmp_path, ".jsonl").rename(tmp_path / "train-a.jsonl")
        self.write(tmp_path, ".jsonl").rename(tmp_path / "train-b.jsonl")
        self.write(tmp_path, ".jsonl").rename(tmp_path / "test.jsonl")
        assert len(load_rows(str(tmp_path / "train-*.jsonl"))) == 6
        assert len(load_rows(str(tmp_path))) == 6
        assert len(load_rows(str(tmp_path), "test[:2]")) == 2
        assert len(load_rows(str(tmp_path), "train[:100000]")) == 6
        with pytest.raises(ValueError, match="dev"):
            load_rows(str(tmp_path), "dev")

    def test_the_files_of_a_folder_that_are_not_read_are_named(self, tmp_path):
        for name in ("train-a", "extra"):
            self.write(tmp_path, ".jsonl").rename(tmp_path / f"{name}.jsonl")
        self.write(tmp_path, ".csv").rename(tmp_path / "train-b.csv")
        (tmp_path / "notes.md").write_text("no rows")
        with pytest.warns(UserWarning, match=r"not read: extra\.jsonl, train-b\.csv$"):
            assert len(load_rows(str(tmp_path))) == 3

    def test_a_name_with_brackets_is_a_name(self, tmp_path):
        path = tmp_path / "rows[1].jsonl"
        self.write(tmp_path, ".jsonl").rename(path)
        assert len(load_rows(str(path))) == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [("none.jsonl", "Couldn't find any data file"), ("a.csv", "No columns to parse")],
    )
    def test_no_such_file(self, tmp_path, name, message):
        (tmp_path / "a.csv").touch()
        with pytest.raises(ArgumentError, match=message):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "JSON parse error: Invalid value. in row 1"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "decoding object value at position 25"),
        ("a.txt", b"a\n\xe9\n", "'utf-8' codec"),
        ("a.csv", b"query,response\na,b\n\xe9,b\n", "'utf-8' codec"),
        ("a.csv", b"query,response\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.jsonl", b"\n\n", "no data"),
        ("a.txt", b"\n \n", "has no rows"),
        ("a.parquet", b"no parquet" * 9, "not a parquet file"),
        ("a.jsonl.gz", b"{}", "Not a gzipped file"),
    ],
)
def test_a_file_that_can_not_be_read_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{name}.* {says}"):
        load_rows(str(tmp_path / f"*{name}"))


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
def test_in_a_folder_or_packed_it_is_named_too(tmp_path, name):
    content = b"query,response\na,\xe9\n"
    packed = name.endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    path = tmp_path / name if packed else tmp_path
    with pytest.raises(ArgumentError, match=rf"{name}: 'utf-8' codec"):
        load_rows(str(path))


def test_of_several_files_the_one_that_can_not_be_read_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ArgumentError, match=r"can't read .*b\.jsonl: JSON parse error"):
        load_rows(str(tmp_path / "*.jsonl"))


class TestMixed:
    sets = tuple(datasets.Dataset.from_list([{"text": one}] * 30) for one in "ab")

    def test_without_weights_each_row_comes_once(self):
        assert mix_rows(self.sets, (), 0)["text"][:] == ["a"] * 30 + ["b"] * 30

    def test_weights_say_how_often_each_is_drawn(self):
        drawn = mix_rows(self.sets, (3, 1), 0)["text"][:]
        assert drawn.count("b") >= 30
        assert 2 < drawn.count("a") / drawn.count("b") < 4
        assert mix_rows(self.sets, (3, 1), 0)["text"][:] == drawn

    def test_sets_of_one_form(self):
        other = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])
        with pytest.raises(ArgumentError, match="all of messages, got completion, prompt and text"):
            mix_rows([*self.sets, other], (), 0)

    def test_texts_and_conversations_do_not_mix(self):
        texts, talks = (
            form_rows(datasets.Dataset.from_list([row]), (), tokenizer(chat=True))
            for row in ({"prompt": "p", "completion": "c"}, PAIR)
        )
        with pytest.raises(ArgumentError, match="all of texts or all of messages, got completion"):
            mix_rows([texts, talks], (), 0)

    @pytest.mark.parametrize("weights", [[1], [0, 0], [2, -1]])
    def test_as_many_weights_as_sets(self, weights):
        with pytest.raises(ArgumentError, match="2 data sets need as many weights above 0, got "):
            mix_rows(self.sets, weights, 0)
