"""What may change between a stop and `--resume`, and what may not: every row of the table."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import disha
from disha.cli import main
from disha.finetune.adapting import ALL_PROJECTIONS
from disha.finetune.models.checkpoint import open_model
from disha.finetune.settings import FinetuneSettings
from tests.conftest import perturb
from tests.finetune.command_line import ROWS, arguments, killed_after, losses_of, write_rows
from tests.finetune.resuming_table import DONE, REFUSED, SAME, TABLE, USUAL, markdown
from tests.pages import DOCS

pytestmark = pytest.mark.usefixtures("without_plots_and_samples")

CASES = [
    pytest.param(row.outcome, case, id=f"{row.outcome}-{number}-{name}")
    for number, row in enumerate(TABLE)
    for name, case in row.cases.items()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """Return folders with all files of a run, and its result, by its flags; not to be changed."""
    made = {}

    def run(flags, stops):
        key = (stops, *sorted(map(repr, flags.items())))
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("run")
            shutil.copytree(tiny_folder("llama3"), folder / "model")
            write_rows(folder / "rows.jsonl", ROWS[:32])
            write_rows(folder / "held-out.jsonl", ROWS[32:])
            write_rows(folder / "more.jsonl", ROWS[:8])
            write_start(folder)
            words = words_of(folder, flags)
            if stops:
                killed_after(DONE + 1, lambda: main(words))
            else:
                assert main(words) == 0
        return made[key]

    return run


def write_start(folder):
    """Write an adapter that training may go on from."""
    model = open_model(folder / "model").load_model(torch.float32)
    disha.inject_adapters(model, ALL_PROJECTIONS, 4)
    perturb(model, size=0.01)
    disha.save_adapter(model, folder / "start.safetensors")


def words_of(folder, flags):
    flags = {
        name: json.loads(json.dumps(value).replace("{folder}", str(folder)))
        for name, value in {**USUAL, **flags}.items()
    }
    return arguments(folder / "model", folder / "rows.jsonl", folder / "out", **flags)


def files_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("outcome", "case"), CASES)
def test_what_resume_does(run, tmp_path, monkeypatch, capsys, outcome, case):
    folder = shutil.copytree(run(case.always, True), tmp_path / "moved")
    case.do(folder, monkeypatch)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)  # takes many seconds
    before = files_under(folder)
    capsys.readouterr()
    code = main([*words_of(folder, {**case.always, **case.flags}), "--resume"])
    said, complaint = capsys.readouterr()
    if outcome == REFUSED:
        assert code == 2, said
        assert re.search(case.says, complaint), complaint
        assert files_under(folder) == before
        return
    assert code == 0, complaint
    [output] = {path.parent for path in folder.rglob("report.json")}
    assert f"resuming from {output / f'checkpoint-{DONE}'}, after step {DONE}" in said
    straight = run({**case.always, **whole_plan(case.flags)}, False) / "out"
    tolerance = {"rtol": 0, "atol": 0} if outcome == SAME else {"rtol": 1e-4, "atol": 1e-6}
    found, expected = (load_file(one / "adapter.safetensors") for one in (output, straight))
    torch.testing.assert_close(found, expected, **tolerance)
    relative = 0 if outcome == SAME else 1e-5
    assert losses_of(output) == pytest.approx(losses_of(straight), rel=relative)


def whole_plan(flags):
    """The flags that the straight run must have too, because they change what comes after."""
    return {
        name: value
        for name, value in flags.items()
        if name in ("max_steps", "num_train_epochs", "lr_scheduler_type")
    }


def test_every_flag_has_a_row():
    flags = FinetuneSettings().to_json().keys()
    tried = {name for row in TABLE for case in row.cases.values() for name in case.flags}
    assert tried <= flags
    # One stops before training, and the other is what all the cases are about.
    assert flags - tried == {"dry_run", "resume"}
    named = set(re.findall(r"`--(\w+)`", "".join(row.what for row in TABLE)))
    assert named == tried


def test_the_docs_show_the_table():
    assert markdown() in (DOCS / "guides" / "resuming.md").read_text(encoding="utf-8")
