"""The notebook of the first hour is its script, run now."""

import json

from docs.notebook import NOTEBOOK, SCRIPT, notebook


def test_it_is_what_the_script_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, kept = (
        json.loads(text)
        for text in (notebook(SCRIPT.read_text("utf-8")), NOTEBOOK.read_text("utf-8"))
    )
    assert made == kept, "run `python -m docs.notebook`"


def test_a_script_becomes_cells_of_text_and_code():
    cells = json.loads(notebook("# %% [markdown]\n# # One\n#\n# two\n\n# %%\nprint(1)\n"))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"]
    assert cells[0]["source"] == ["# One\n", "\n", "two"]
    assert cells[1]["outputs"][0]["text"] == ["1\n"]
