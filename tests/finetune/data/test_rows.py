from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.rows import Row, Rows
from disha.finetune.errors import BadRowError


def listed(*names):
    return [Row({"name": name}, f"place {name}") for name in names]


def names(rows):
    return [row["name"] for row in rows]


@given(st.lists(st.lists(st.integers(), max_size=4), max_size=5), st.data())
def test_joined_and_sliced_rows_are_as_lists_are(parts, data):
    joined = Rows([listed(*part) for part in parts])
    plain = [name for part in parts for name in part]
    assert names(joined) == plain
    assert len(joined) == len(plain)
    wanted = data.draw(st.slices(len(plain)))
    assert names(joined[wanted]) == plain[wanted]
    chosen = data.draw(st.lists(st.sampled_from(range(len(plain))))) if plain else []
    assert names(joined.select(chosen)) == [plain[index] for index in chosen]
    again = data.draw(st.slices(len(plain[wanted])))
    assert names(joined[wanted][again]) == plain[wanted][again]


def test_rows_pickle():
    rows = Rows([listed("a"), listed("b", "c")])[1:]
    assert names(pickle.loads(pickle.dumps(rows))) == ["b", "c"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, r"here has no field 'query'; its fields are: none \(--dataset_field"),
        ({"a": 1, "b": 2}, r"here has no field 'query'; its fields are: 'a', 'b' \(--data"),
        ({"query": 3}, r"here: field 'query' must be text, found int 3"),
        ({"query": None}, r"here: field 'query' must be text, found NoneType None"),
        ({"query": "a\ud83d"}, r"here: field 'query' holds half of a surrogate pair at char.* 1"),
    ],
)
def test_a_field_that_is_no_text_is_named(fields, complaint):
    with pytest.raises(BadRowError, match=complaint):
        Row(fields, "here").text("query")


def test_a_row_that_can_not_be_read_complains_when_asked():
    row = Row({}, "here", "here is not JSON")
    with pytest.raises(BadRowError, match="here is not JSON"):
        row["query"]
