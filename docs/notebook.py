"""`python -m docs.notebook`: write docs/examples/first_hour.ipynb from docs/first_hour.py.

In the script, `# %%` begins a cell of code, and `# %% [markdown]` one of text. The cells run, and
what they print goes into the notebook.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "first_hour.py"
NOTEBOOK = Path(__file__).parent / "examples" / "first_hour.ipynb"
CELL = re.compile(r"^# %%(?P<text> \[markdown\])?\n(?P<body>.*?)(?=^# %%|\Z)", re.S | re.M)


def cells_of(script: str) -> Iterator[dict[str, Any]]:
    """Run the script, and yield its cells in the format of notebooks."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, found in enumerate(CELL.finditer(script)):
        body = found["body"].strip()
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if found["text"]:
            text = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            yield {**cell, "cell_type": "markdown", "source": _lines(text)}
            continue
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(body, str(SCRIPT), "exec"), scope)
        output = {"name": "stdout", "output_type": "stream", "text": _lines(said.getvalue())}
        outputs = [output] if said.getvalue() else []
        yield {
            **cell,
            "cell_type": "code",
            "execution_count": None,
            "outputs": outputs,
            "source": _lines(body),
        }


def notebook(script: str) -> str:
    """Return the notebook as JSON."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {
        "cells": list(cells_of(script)),
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Write the notebook."""
    script = SCRIPT.read_text(encoding="utf-8")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = notebook(script)
        os.chdir(here)
    NOTEBOOK.write_text(made, encoding="utf-8")
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
