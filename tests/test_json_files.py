"""JSON files of others: what is read, and what is refused before or after."""

from __future__ import annotations

import os

import pytest

from disha import AdapterFileError, AdapterIOError
from disha.files.json_files import read_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.json"


def test_an_object_is_read(path):
    path.write_text('{"r": 4, "names": ["ä"]}', encoding="utf-8")
    assert read_json(path) == {"r": 4, "names": ["ä"]}


def test_as_many_bytes_as_are_allowed(path):
    path.write_text('{"r": 4}')
    assert read_json(path, largest=8) == {"r": 4}
    with pytest.raises(AdapterFileError, match=r"config\.json is larger than 7 bytes"):
        read_json(path, largest=7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not valid JSON: .*; get the file again$"),
        ("[" * 100_000, "is not valid JSON: .*; get the file again$"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' comes twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' comes twice"),
        ('{"a": "\\ud800"}', "a text in it holds half of a surrogate pair"),
        ('{"a": [' + "[]," * 1_000_000 + "[]]}", "it has more than 1,000,000 lists and objects"),
        ('{"a": ' + "9" * 100_000 + "}", "is not valid JSON: .*limit"),
        (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec"),
        ("[1]", "must be a JSON object; it is a list; get the file again"),
    ],
)
def test_what_is_no_object_is_refused(path, text, says):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterFileError, match=rf"config\.json .*{says}"):
        read_json(path)


def test_what_is_not_there_or_no_file(path):
    with pytest.raises(AdapterIOError, match=r"config\.json"):
        read_json(path)
    os.mkfifo(path)  # which nobody writes into
    with pytest.raises(AdapterIOError, match="it is a pipe, not a regular file; check the path"):
        read_json(path)
