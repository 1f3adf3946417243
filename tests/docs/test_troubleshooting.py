"""The messages on the page of troubleshooting are those of the library."""

import ast
import re
from pathlib import Path

import pytest

import disha
from tests.pages import DOCS, tables_of

TEXT = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
SPAN = re.compile(r"^`([^`]+)`$")
QUOTED = [
    found[1]
    for table in tables_of(TEXT)
    for line in table
    if (found := SPAN.match(line[0].removesuffix(" (a warning)")))
]


def texts():
    """Yield every text of the library, with … for what is put into it."""
    for path in Path(disha.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def messages():
    return "\n".join(texts())


@pytest.mark.parametrize("message", QUOTED)
def test_each_message_is_one_of_the_library(message, messages):
    assert message in messages


def test_there_are_enough_of_them():
    assert len(QUOTED) > 25


def test_every_error_of_the_reference_leads_there():
    reference = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = tables_of(reference)[0][1:]
    named = {re.search(r"`(\w+)`", line[0])[1] for line in rows}
    errors = {name for name in disha.__all__ if name.endswith(("Error", "Warning"))}
    assert named == errors - {"DishaError"}
    assert all("../guides/troubleshooting.md#" in line[1] for line in rows)
