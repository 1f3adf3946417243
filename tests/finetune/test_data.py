import datasets
import pytest
from trl import SFTConfig, SFTTrainer

from disha import ArgumentError
from disha.finetune.base import load_base
from disha.finetune.data import formed, load_rows, mixed
from tests.finetune.tiny_models import tokenizer, write_rows

PAIR = {"query": "say two", "response": "two"}
UNCHANGED = {"query": "2030-01-31", "response": "007", "more": "NA"}  # no date, number or gap
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PLAIN = {"prompt": "say two", "completion": "\ntwo"}
CHAT = {
    "prompt": [{"role": "user", "content": "say two"}],
    "completion": [{"role": "assistant", "content": "two"}],
}
SPLIT = {"prompt": TALK[:1], "completion": TALK[1:]}


def form(row, *fields, chat=False):
    return formed(datasets.Dataset.from_list([row]), fields, tokenizer(chat=chat))[0]


@pytest.mark.parametrize(
    ("row", "fields", "chat", "expected"),
    [
        (PAIR, (), False, PLAIN),
        (PAIR, (), True, CHAT),
        ({"q": "say two", "a": "two", "more": 1}, ("q", "a"), False, PLAIN),
        ({"q": 2, "a": 4}, ("q", "a"), False, {"prompt": "2", "completion": "\n4"}),
        ({"instruction": "say", "input": "two", "output": "two"}, (), False,
         {"prompt": "say\n\ntwo", "completion": "\ntwo"}),
        ({"instruction": "say two", "input": "", "output": "two"}, (), False, PLAIN),
        ({"prompt": "p", "completion": "c"}, (), True, {"prompt": "p", "completion": "c"}),
        ({"prompt": 1, "completion": 2}, (), True, {"prompt": "1", "completion": "2"}),
        ({"text": "all of it"}, (), False, {"text": "all of it"}),
        ({"text": 5}, (), False, {"text": "5"}),
        ({"body": "all of it"}, ("body",), False, {"text": "all of it"}),
        ({"messages": TALK}, (), True, {"messages": TALK}),
        ({"turns": TALK, "tools": "[]"}, ("turns",), True, {"messages": TALK, "tools": "[]"}),
        ({"conversations": SHAREGPT}, (), True, {"messages": TALK}),
    ],
)  # fmt: skip
def test_forms(row, fields, chat, expected, monkeypatch):
    monkeypatch.setattr("disha.finetune.data.masks_answers", lambda _: True)
    assert form(row, *fields, chat=chat) == expected


def test_a_conversation_is_split_where_trl_can_not_tell_the_answers_apart(monkeypatch):
    assert form({"messages": TALK}, chat=True) == SPLIT


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (PAIR, ("query", "answer"), "have the fields query, response; .* got query answer"),
        (PAIR, ("query", "response", "query"), "one or two of them"),
        ({"a": "x", "b": "y"}, (), "have the fields a, b; name the question and the answer"),
        ({"messages": TALK}, (), "the model has no chat template"),
        ({"query": "q", "response": None}, (), "row 1 of the data .* no text as response"),
        ({"text": None}, (), "row 1 of the data .* no text as text"),
        ({"prompt": "p", "completion": None}, (), "row 1 of the data .* no text as completion"),
        ({"query": {"a": 1}, "response": "r"}, (), "row 1 of the data .* no text as query"),
    ],
)
def test_rows_that_can_not_be_used(row, fields, message):
    with pytest.raises(ArgumentError, match=message):
        form(row, *fields)


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

    @pytest.mark.parametrize(
        ("name", "message"),
        [("none.jsonl", "no file"), ("a.xml", "must end with one of"), ("a.csv", "or it is empty")],
    )
    def test_no_such_file(self, tmp_path, name, message):
        (tmp_path / "a.xml").touch()
        (tmp_path / "a.csv").touch()
        with pytest.raises(ArgumentError, match=message):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "line 3: Expecting value"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "decoding object value at position 25"),
        ("a.txt", b"a\n\xe9\n", "line 2: 'utf-8' codec"),
        ("a.csv", b"query,response\na,b\n\xe9,b\n", "line 3: 'utf-8' codec"),
        ("a.csv", b"query,response\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.jsonl", b"\n\n", "no data"),
        ("a.txt", b"\n \n", "has no rows"),
        ("a.parquet", b"no parquet" * 9, "not a parquet file"),
        ("a.jsonl.gz", b"{}", "Not a gzipped file"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_with_the_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{name}.* {says}"):
        load_rows(str(tmp_path / f"*{name}"))


def test_of_several_files_the_one_that_can_not_be_read_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ArgumentError, match=r"can't read .*b\.jsonl: line 1"):
        load_rows(str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIR, {"query": "a"}], "no text as response in {'query': 'a', 'response': None}"),
        ([{"messages": TALK}, {"messages": TALK[:1]}], "'assistant' is not in list"),
        (
            [{"messages": TALK}, {"messages": [TALK[0], {"role": "assistant"}]}],
            "no text as content",
        ),
    ],
)
def test_a_row_that_can_not_be_used_is_named_with_its_file(tmp_path, rows, says):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ArgumentError) as caught:
        formed(load_rows(str(path)), (), tokenizer(chat=True))
    assert str(caught.value).startswith(f"row 2 of {path} can't be used: ")
    assert says in str(caught.value)


def test_texts_and_numbers_in_one_field_are_texts(tmp_path):
    rows = [{"prompt": "p", "completion": completion} for completion in ("two", 5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert formed(load_rows(str(path)), (), tokenizer())["completion"][:] == ["two", "5"]


class TestMixed:
    sets = tuple(datasets.Dataset.from_list([{"text": one}] * 30) for one in "ab")

    def test_without_weights_each_row_comes_once(self):
        assert mixed(self.sets, (), 0)["text"][:] == ["a"] * 30 + ["b"] * 30

    def test_weights_say_how_often_each_is_drawn(self):
        drawn = mixed(self.sets, (3, 1), 0)["text"][:]
        assert drawn.count("b") >= 30
        assert 2 < drawn.count("a") / drawn.count("b") < 4
        assert mixed(self.sets, (3, 1), 0)["text"][:] == drawn

    def test_sets_of_one_form(self):
        other = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])
        with pytest.raises(ArgumentError, match="one form, got completion, prompt and text"):
            mixed([*self.sets, other], (), 0)

    @pytest.mark.parametrize("weights", [[1], [0, 0], [2, -1]])
    def test_as_many_weights_as_sets(self, weights):
        with pytest.raises(ArgumentError, match="2 data sets need as many weights above 0, got "):
            mixed(self.sets, weights, 0)


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_answer_is_learned(tiny, chatty, tmp_path, chat):
    model, words = load_base(str(chatty if chat else tiny))
    rows = formed(datasets.Dataset.from_list([PAIR]), (), words)
    args = SFTConfig(tmp_path, report_to=[], use_cpu=True, bf16=False)
    row = SFTTrainer(model, args, train_dataset=rows, processing_class=words).train_dataset[0]
    learned = words.decode([label for label in row["labels"] if label != -100])
    asked = words.decode(
        [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    )
    assert learned.strip() == ("two<|im_end|>" if chat else "two</s>")
    assert asked.strip().endswith("assistant" if chat else "say two")
