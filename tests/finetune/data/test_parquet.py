from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

import disha
from disha.finetune.data.parquet import ParquetRows
from disha.finetune.errors import BadRowError, DataError

TEXT = st.text(st.characters(codec="utf-8"))
ROWS = st.lists(st.fixed_dictionaries({"query": TEXT, "numbers": st.lists(st.floats(width=32))}))


def written(path, rows, group=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@given(ROWS.filter(bool), st.integers(1, 5))
def test_any_rows_are_read_back(tmp_path_factory, rows, group):
    path = written(tmp_path_factory.getbasetemp() / "rows.parquet", rows, group)
    read = ParquetRows(path)
    assert repr([row.fields for row in read]) == repr(pq.read_table(path).to_pylist())
    assert [row.place for row in read] == [f"{path}, row {i + 1}" for i in range(len(rows))]


def test_chat_messages_come_as_lists_of_objects(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = written(tmp_path / "rows.parquet", [{"messages": messages}])
    [row] = ParquetRows(path)
    assert row["messages"] == messages


def test_an_empty_table_has_no_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    assert len(ParquetRows(path)) == 0


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"rows\.parquet can't be read as Parquet"):
        ParquetRows(path)


def test_a_damaged_group_is_named(tmp_path):
    path = written(tmp_path / "rows.parquet", [{"text": "x" * 1000} for _ in range(100)], 10)
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet can't be read"):
        list(ParquetRows(path))


def test_two_columns_of_one_name_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["query", "response", "query"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet has several fields named 'query'; give"):
        ParquetRows(path)


def test_a_time_of_an_unknown_zone_is_no_bad_row(tmp_path):
    moments = pa.array([0], pa.timestamp("s", tz="Nowhere/At_All"))
    pq.write_table(pa.table({"query": ["a"], "when": moments}), tmp_path / "rows.parquet")
    [row] = ParquetRows(tmp_path / "rows.parquet")
    assert row.text("query") == "a"


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = written(tmp_path / "rows.parquet", [{"n": 1}])
    rows = ParquetRows(path)
    written(path, [{"n": 1}, {"n": 2}])
    with pytest.raises(DataError, match=r"rows\.parquet was changed while it was being read"):
        next(iter(rows))


def test_without_pyarrow_the_remedy_is_said(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.parquet", [{"n": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(disha.MissingPackageError, match="pip install pyarrow"):
        ParquetRows(path)


@pytest.mark.parametrize("kind", ["ns", "us"])
def test_a_moment_that_python_does_not_know_is_no_bad_row(tmp_path, kind):
    moments = pa.array([2**62 + 1], pa.timestamp(kind))
    pq.write_table(pa.table({"query": ["a"], "when": moments}), tmp_path / "rows.parquet")
    [row] = ParquetRows(tmp_path / "rows.parquet")
    assert row.text("query") == "a"
    assert row["when"].value == 2**62 + 1
    with pytest.raises(BadRowError, match="'when' must be text, found Timestamp"):
        row.text("when")


def test_texts_of_every_type_are_texts(tmp_path):
    table = pa.table(
        {
            "plain": ["a", "b", None],
            "large": pa.array(["a", "b", None], pa.large_string()),
            "dictionary": pa.array(["a", "b", None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = list(ParquetRows(tmp_path / "rows.parquet"))
    for name in table.column_names:
        assert [rows[0].text(name), rows[1].text(name)] == ["a", "b"]
        with pytest.raises(BadRowError, match=r"row 3: field .* must be text, found NoneType"):
            rows[2].text(name)


def test_text_that_is_not_utf_8_is_a_bad_row(tmp_path):
    offsets, content = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa")
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])
    pq.write_table(pa.table({"query": texts}), tmp_path / "rows.parquet")
    rows = list(ParquetRows(tmp_path / "rows.parquet"))
    with pytest.raises(BadRowError, match=r"rows\.parquet, row 1 is not UTF-8 text"):
        rows[0].text("query")
    assert rows[1].text("query") == "a"
