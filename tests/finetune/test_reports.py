"""Reports, written by the real libraries without a network, and read back by them."""

from __future__ import annotations

import importlib.util
import json
import math
import struct

import pytest

from disha.finetune import reports
from disha.finetune.errors import OutputError
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import recording
from tests.finetune.command_line import adapter_of
from tests.finetune.test_metrics import lines_in, step

SETTINGS = {
    "bone_r": 8,
    "learning_rate": 1e-3,
    "dataset_field": ("query", "response"),
    "none": None,
}


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # it keeps what the environment said before
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)


def wandb_records(path):
    """The records of a file of wandb: pieces in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_rows(folder):
    """What all files of wandb hold: the settings, and (name, step, value) of each number."""
    import wandb

    wandb.teardown()  # its other process may still be writing
    settings, rows, runs = {}, [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                runs.add(record.run.run_id)
                updates = record.run.config.update
                settings |= {one.key: json.loads(one.value_json) for one in updates}
            found = {
                one.key or "/".join(one.nested_key): json.loads(one.value_json)
                for one in record.history.item
            }
            rows += [(k, found["_step"], v) for k, v in found.items() if k[0] != "_"]
    assert len(runs) == 1
    return settings, rows


def mlflow_rows(folder):
    import mlflow

    client = mlflow.MlflowClient()
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    rows = [
        (name, one.step, one.value)
        for name in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, name)
    ]
    return {
        name: json.loads(value) for name, value in run.data.params.items() if value == "8"
    }, rows


def trackio_rows(folder):
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("disha")
    rows = [
        (name, line["step"], value)
        for line in SQLiteStorage.get_logs("disha", run)
        for name, value in line.items()
        if name.startswith(("train/", "eval/"))
    ]
    return SQLiteStorage.get_run_config("disha", run), rows


def tensorboard_rows(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
    rows = [
        (name, event.step, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    ]
    [text] = events.Tensors("settings/text_summary")
    settings = dict(
        line.strip().split(": ", 1)
        for line in text.tensor_proto.string_val[0].decode().splitlines()
    )
    return {"bone_r": int(settings["bone_r"])}, rows


READERS = {
    "tensorboard": tensorboard_rows,
    "wandb": wandb_rows,
    "trackio": trackio_rows,
    "mlflow": mlflow_rows,
}


@pytest.mark.parametrize("name", READERS)
def test_a_report_holds_everything_once_also_where_the_run_goes_on(tmp_path, name):
    lock = FolderLock(tmp_path / "out")
    with recording(lock, reports=[name], settings=SETTINGS) as metrics:
        metrics.record_evaluation(0, 3.5)
        for number in range(1, 6):
            metrics.record_step(step(number))
    with recording(lock, reports=[name], settings=SETTINGS, after=3) as metrics:
        for number in range(4, 7):
            metrics.record_step(step(number, eval_loss=2.0 if number == 6 else None))
    settings, rows = READERS[name](tmp_path)
    assert settings["bone_r"] == 8
    expected = [("eval/loss", 0, 3.5), ("eval/perplexity", 0, math.exp(3.5))]
    expected += [("eval/loss", 6, 2.0), ("eval/perplexity", 6, math.exp(2.0))]
    for number in range(1, 7):
        expected += [
            ("train/loss", number, 3.0 / number),
            ("train/learning_rate", number, 1e-3),
            ("train/gradient_norm", number, 1.5),
            ("train/tokens_per_second", number, 200.0),
        ]
    assert [row[:2] for row in sorted(rows)] == [row[:2] for row in sorted(expected)]
    for found, wanted in zip(sorted(rows), sorted(expected), strict=True):
        assert found[2] == pytest.approx(wanted[2], rel=1e-6)


def test_a_run_reports_to_all_of_them_and_learns_the_same(finetune, tmp_path):
    finetune.good(output_dir=tmp_path / "plain")
    expected = adapter_of(tmp_path / "plain")
    output = tmp_path / "out"
    finetune.good(report_to="tensorboard, wandb,trackio,mlflow", output_dir=output)
    assert adapter_of(output) == expected
    for read in READERS.values():
        _, rows = read(tmp_path)
        assert sorted(one for name, one, _ in rows if name == "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_new_run_in_the_same_folder_begins_a_new_report(tmp_path):
    lock = FolderLock(tmp_path / "out")
    for _ in range(2):
        with recording(lock, reports=["wandb"], settings=SETTINGS) as metrics:
            metrics.record_step(step(1))
    with recording(lock):
        pass
    assert not (tmp_path / "out" / "reports.json").exists()
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 2


def test_a_report_that_is_added_later_begins_where_the_run_goes_on(tmp_path):
    lock = FolderLock(tmp_path / "out")
    with recording(lock) as metrics:
        for number in range(1, 6):
            metrics.record_step(step(number))
    with recording(lock, reports=["trackio"], settings=SETTINGS, after=3) as metrics:
        metrics.record_step(step(4))
    assert [one for name, one, _ in trackio_rows(tmp_path)[1] if name == "train/loss"] == [4]


class Failing:
    """A report that fails at its second step, and when it is closed."""

    def __init__(self, *_):
        self.seen, self.run, self.reported = [], None, -1

    def log(self, scalars, number):
        if number == 2:
            raise RuntimeError("the server is gone")
        self.seen.append(number)

    def close(self):
        raise RuntimeError("the server is gone")


def test_a_report_that_fails_is_one_warning(tmp_path, monkeypatch, capsys):
    report = Failing()
    monkeypatch.setattr(reports, "OPENERS", {"wandb": lambda *_: report})
    with recording(FolderLock(tmp_path), reports=["wandb"]) as metrics:
        for number in range(1, 5):
            metrics.record_step(step(number))
    assert report.seen == [1]
    assert len(lines_in(tmp_path)) == 4
    assert capsys.readouterr().err == (
        "disha: warning: wandb can't be written: the server is gone; training continues, but is no "
        "longer recorded there\n"
    )


def test_a_report_that_can_not_begin_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    complaint = "the report to wandb can't be written: "
    with (
        pytest.raises(OutputError, match=complaint),
        recording(FolderLock(tmp_path), reports=["wandb"]),
    ):
        pass


def test_only_the_main_process_reports(tmp_path):
    with recording(FolderLock(tmp_path / "out"), reports=list(READERS), main=False) as metrics:
        metrics.record_step(step(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", READERS)
def test_a_library_that_is_missing_names_the_command_that_installs_it(finetune, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda one, *rest: None if one == name else find(one, *rest)
    )
    done = finetune(report_to=name)
    assert done.code == 2
    assert f"--report_to {name} needs the package {name}" in done.complaint
    assert done.complaint.endswith(f"run: pip install {name}\n")


def test_damaged_notes_on_runs_are_named(tmp_path):
    (tmp_path / "reports.json").write_text("{")
    complaint = r"reports\.json can't be used"
    lock = FolderLock(tmp_path)
    with pytest.raises(OutputError, match=complaint), recording(lock, reports=["wandb"], after=1):
        pass
