from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from disha.finetune.data.files import file_format, read_file
from disha.finetune.errors import BadRowError, DataError

ROWS = [{"query": "a, b", "response": 'c "d"'}, {"query": "é\nf", "response": "g"}]
LINES = "\n".join(json.dumps(row) for row in ROWS)
TABLE = 'query,response\n"a, b","c ""d"""\n"é\nf",g\n'


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(rows):
    return [dict(row.fields) for row in rows]


CONTENTS = {
    "rows.jsonl": LINES,
    "rows.NDJSON": LINES,
    "rows.csv": TABLE,
    "rows.tsv": TABLE.replace(",", "\t").replace("a\t b", "a, b"),
    "rows.json": json.dumps(ROWS, indent=2),
    "inside.json": json.dumps({"version": "1", "tags": ["x"], "data": ROWS}),
    "lines.json": LINES,
    "marked.json": "\ufeff" + json.dumps(ROWS),
    "marked.csv": "\ufeff" + TABLE.replace("\n", "\r\n").replace("é\r\n", "é\n"),
    "rows.v2.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.GZ": gzip.compress(TABLE.encode()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert fields(read_file(written(tmp_path, name, CONTENTS[name]))) == ROWS


def test_so_does_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert fields(read_file(tmp_path / "rows.parquet")) == ROWS


def test_plain_text_is_a_row_per_line(tmp_path):
    rows = read_file(written(tmp_path, "rows.txt", "one\n\n  two \r\nthree"))
    assert fields(rows) == [{"text": "one"}, {"text": "  two "}, {"text": "three"}]


def test_a_json_object_without_a_list_is_a_row(tmp_path):
    assert fields(read_file(written(tmp_path, "row.json", json.dumps(ROWS[0], indent=1)))) == [
        ROWS[0]
    ]


def test_rows_of_json_know_their_place(tmp_path):
    rows = list(read_file(written(tmp_path, "rows.json", json.dumps([{"a": 1}, 3]))))
    assert rows[0].place.endswith("rows.json, row 1")
    with pytest.raises(BadRowError, match=r"rows\.json, row 2 holds a JSON int; every row must"):
        rows[1]["a"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("3", r"rows\.json holds a JSON int; it must hold a list of objects"),
        ("[1,\n2", r"rows\.json is not JSON \(.*line 2.*\); it must hold a list of objects, or"),
        ("[" * 100_000, r"rows\.json is not JSON"),
        ('{"a": [{}], "b": [{}]}', r"rows\.json holds several lists of objects: 'a', 'b'"),
        (b"\xff", r"rows\.json is not UTF-8 text"),
        ("", r"rows\.json is not JSON"),
    ],
)
def test_json_that_holds_no_rows_is_named(tmp_path, content, complaint):
    with pytest.raises(DataError, match=complaint):
        read_file(written(tmp_path, "rows.json", content))


@pytest.mark.parametrize(
    "name", ["rows", "rows.xlsx", "rows.gz", ".gz", "rows.parquet.gz", "a.b/c"]
)
def test_unknown_formats(name):
    assert file_format(Path(name)) is None


def test_an_unknown_format_is_named_with_those_known(tmp_path):
    with pytest.raises(
        DataError,
        match=r"the name of .*rows\.xlsx must end with \.parquet, .* \.jsonl,",
    ):
        read_file(written(tmp_path, "rows.xlsx", b""))
