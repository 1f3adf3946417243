from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.text_files import csv_rows, json_line_rows, text_line_rows
from disha.finetune.errors import BadRowError, DataError

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('\r\n\x0c\x1e\u2028",;\t')))
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"])


@pytest.fixture
def opened(tmp_path):
    def opened(content):
        path = tmp_path / "rows"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return opened


def anywhere(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rows"
    path.write_bytes(content.encode())
    return path


def fields(rows):
    return [dict(row.fields) for row in rows]


def complaint(row):
    with pytest.raises(BadRowError) as caught:
        row["query"]
    return str(caught.value)


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("\r\n \u2028\x0c"))))
def test_any_text_is_rows_of_its_lines(tmp_path_factory, text):
    text = text.removeprefix("\ufeff")
    rows = text_line_rows(anywhere(tmp_path_factory, text))
    lines = text.split("\n")
    filled = [i for i, line in enumerate(lines, 1) if line.encode().strip()]
    assert [row["text"] for row in rows] == [lines[i - 1].rstrip("\r") for i in filled]
    assert [row.place.rpartition("line ")[2] for row in rows] == [str(i) for i in filled]


@given(st.lists(st.dictionaries(TEXT, TEXT)), LINE_ENDS, st.booleans(), st.booleans())
def test_any_objects_are_read_from_lines(tmp_path_factory, objects, line_end, ascii, is_ended):
    lines = [json.dumps(one, ensure_ascii=ascii) for one in objects]
    text = line_end.join(lines) + line_end * is_ended
    assert fields(json_line_rows(anywhere(tmp_path_factory, text))) == objects


@given(
    st.lists(TEXT, min_size=2, max_size=3, unique=True),
    st.lists(st.lists(TEXT, min_size=3, max_size=3)),
    st.sampled_from([",", "\t"]),
    # The writer leaves a lone carriage return unquoted if that is no line's end.
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
)
def test_any_table_is_read_as_the_csv_module_writes_it(
    tmp_path_factory, header, table, delimiter, style
):
    written = io.StringIO(newline="")
    line_end, quoting = style
    writer = csv.writer(written, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    table = [record[: len(header)] for record in table]
    writer.writerows([header, *table])
    text = written.getvalue()
    if text.startswith("\ufeff"):
        return
    rows = csv_rows(anywhere(tmp_path_factory, text), delimiter)
    assert fields(rows) == [dict(zip(header, record, strict=True)) for record in table]


def test_places_count_lines_and_not_rows(opened):
    table = 'query,response\n\n"one\ntwo\n\nthree",a\r\nshort,b\n  \n\n"x\ny",c'
    rows = list(csv_rows(opened("\ufeff" + table), ","))
    assert [row["response"] for row in rows] == ["a", "b", "c"]
    assert [row["query"] for row in rows] == ["one\ntwo\n\nthree", "short", "x\ny"]
    assert [int(re.search(r"line (\d+)$", row.place)[1]) for row in rows] == [3, 7, 10]


GOOD = '{"query": "a"}'


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([GOOD, "{oops"], "rows, line 2 is not JSON"),
        ([GOOD, "[" * 100_000], "rows, line 2 is not JSON"),
        ([GOOD, "", "[1, 2]"], "rows, line 3 holds a JSON list; every line must hold one JSON"),
        (["3"], "rows, line 1 holds a JSON int"),
        ([b'{"query": "\xff"}'], r"rows, line 1 is not UTF-8 text \(invalid start byte\)"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_good(opened, lines, wanted):
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    rows = list(json_line_rows(opened(b"\n".join([*encoded, GOOD.encode()]))))
    assert re.search(wanted, complaint(rows[-2]))
    assert rows[-1]["query"] == "a"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (b"a", "rows, line 2 has 1 fields, where the header names 2"),
        (b"a,b,c", "rows, line 2 has 3 fields, where the header names 2"),
        (b'"a"b,c', "rows, line 2 can't be read: ',' expected after"),
        (b"\xff,b", r"rows, line 2 is not UTF-8 text"),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_good(opened, record, wanted):
    rows = list(csv_rows(opened(b"query,response\n" + record + b"\ngood,row\n"), ","))
    assert re.search(wanted, complaint(rows[0]))
    assert dict(rows[1].fields) == {"query": "good", "response": "row"}
    assert len(rows) == 2


def test_a_quote_that_never_ends_is_named(opened):
    rows = list(csv_rows(opened('query,response\na,b\n"c,d\ne,f\n'), ","))
    assert rows[0]["query"] == "a"
    assert re.search("rows, line 3 can't be read: unexpected end of data", complaint(rows[1]))


def test_long_fields_are_read_and_the_limit_of_others_stays(opened):
    limit = csv.field_size_limit()
    [row] = csv_rows(opened("query,response\na," + "b" * 300_000), ",")
    assert len(row["response"]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "rows holds no rows; its first line must name the fields"),
        (b"a,b,a\n1,2,3\n", "rows has several fields named 'a'"),
        (b"\xe9a,b\n1,2\n", "rows, line 1 can't be read as names of fields"),
        (b'"a"b,c\n1,2\n', "rows, line 1 can't be read as names of fields"),
    ],
)
def test_a_header_that_can_not_be_used_is_named(opened, content, wanted):
    with pytest.raises(DataError, match=wanted):
        csv_rows(opened(content), ",")


# --- bytes ---------------------------------------------------------------------------------------

CONTENT = b"one\r\ntwo\n\n\x0cthree\x1e\xe2\x80\xa8and on"
LINES = [{"text": line} for line in ("one", "two", "\x0cthree\x1e\u2028and on")]


def written(tmp_path, content):
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    return path


def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_no_part_of_them(opened):
    assert fields(text_line_rows(opened(CONTENT))) == LINES
    assert fields(text_line_rows(opened(b"\xef\xbb\xbf" + CONTENT))) == LINES


def test_utf_16_is_named(opened):
    with pytest.raises(DataError, match="rows is UTF-16, and must be UTF-8; save it as UTF"):
        text_line_rows(opened("one".encode("utf-16")))


def test_what_can_not_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"can't read .*absent\.txt: No such file"):
        text_line_rows(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="it is a folder, not a regular file"):
        text_line_rows(tmp_path)


def test_packed_files_are_unpacked(tmp_path):
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(CONTENT))
    assert fields(text_line_rows(path)) == LINES


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(CONTENT)[:-9]], ids=["not packed", "cut short"]
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.txt\.gz is damaged and can't be unpacked"):
        text_line_rows(path)


def grown(path):
    path.write_bytes(path.read_bytes() + b"more")


def touched(path):
    os.utime(path, ns=(1, 1))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"something else")
    other.replace(path)


@pytest.mark.parametrize("change", [grown, touched, replaced])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path, change):
    path = written(tmp_path, CONTENT)
    rows = text_line_rows(path)
    change(path)
    with pytest.raises(DataError, match=r"rows\.txt was changed while it was being read"):
        list(rows)


def test_a_file_that_vanishes_is_named(tmp_path):
    path = written(tmp_path, CONTENT)
    rows = text_line_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        list(rows)
