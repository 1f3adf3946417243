import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

import disha
from disha.cli.measuring import _count_exact
from disha.cli.models import PromptRunner
from disha.finetune.base import load_base
from disha.finetune.forgetting import OwnText

ROWS = [{"query": f"say {word}", "response": word * 2} for word in ("one", "three", "eleven")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def expected(model, tokenizer):
    """The mean loss of a token of an answer, and their number, by hand."""
    losses = []
    for row in ROWS:
        prompt = f"<user>{row['query']}</s><assistant>"
        ids = tokenizer(f"{prompt}{row['response']}</s>", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        logits = model(ids).logits[0, start - 1 : -1]
        losses += F.cross_entropy(logits, ids[0, start:], reduction="none").tolist()
    return sum(losses) / len(losses), len(losses)


def test_loss_with_and_without_the_adapter(run, language_model, rows):
    adapter = language_model / "adapter.safetensors"
    found = run("evaluate", "--adapter", adapter, "--data", rows, "--compare", "--json")
    assert found.code == 0
    model, tokenizer = load_base(str(language_model / "model"))
    with torch.no_grad():
        base = expected(model, tokenizer)
        disha.load_adapter(model, adapter)
        adapted = expected(model, tokenizer)
    assert base[0] != pytest.approx(adapted[0], rel=1e-2)
    for name, (loss, tokens) in (("base", base), ("adapter", adapted)):
        one = found.json[name]
        assert one["loss"] == pytest.approx(loss, rel=1e-5)
        assert one["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert one["tokens"] == tokens
        assert one["rows"] == len(ROWS)
    text = run("evaluate", "--adapter", adapter, "--data", rows).out
    assert f"{adapted[0]:.5g}" in text
    assert f"{base[0]:.5g}" not in text


def test_batches_do_not_change_the_loss(run, language_model, tmp_path):
    data = write(tmp_path / "texts.jsonl", [{"text": text} for text in ("one two", "three", "")])
    given = ("evaluate", "--base", language_model / "model", "--data", data, "--json")
    one = run(*given, "--per_device_eval_batch_size", 1).json["base"]["loss"]
    assert run(*given).json["base"]["loss"] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_exact_answers_are_counted(run, language_model, tmp_path, chat):
    base = shutil.copytree(language_model / "model", tmp_path / "model")
    if not chat:
        (base / "chat_template.jinja").unlink()
    asked = ("generate", "--base", base, "--max_new_tokens", 6, "--prompt")
    rows = [{"query": query, "response": f" {run(*asked, query).out}"} for query in ("a", "bcd")]
    data = write(tmp_path / "rows.jsonl", [*rows, {"query": "a", "response": "zzz"}])
    given = ("evaluate", "--data", data, "--exact_match", "--max_new_tokens", 6, "--json")
    assert run(*given, "--base", base).json["base"]["exact"] == 2
    adapter = ("--adapter", language_model / "adapter.safetensors")
    both = run(*given, "--base", base, *adapter, "--compare").json
    assert both["base"]["exact"] == 2
    assert both["adapter"]["exact"] == 0


def test_several_files_are_measured_each_and_together(run, language_model, rows, tmp_path):
    other = write(tmp_path / "other.jsonl", ROWS[:1])
    given = ("evaluate", "--base", language_model / "model", "--json", "--data")
    both = run(*given, rows, other).json
    alone = [run(*given, path).json for path in (rows, other)]
    for name, expected in zip((rows, other), alone, strict=True):
        assert both[f"base, {name}"] == pytest.approx(expected["base"])
    total = sum(one["base"]["loss"] * one["base"]["tokens"] for one in alone)
    assert both["base"]["loss"] == pytest.approx(total / both["base"]["tokens"])
    assert both["base"]["rows"] == 4


def test_a_flag_that_comes_twice_adds_its_files(run, language_model, rows, tmp_path):
    other = write(tmp_path / "other.jsonl", ROWS[:1])
    given = ("evaluate", "--base", language_model / "model", "--json")
    assert run(*given, "--data", rows, "--data", other).json["base"]["rows"] == 4


def test_of_several_turns_the_last_answer_is_compared(language_model):
    model, tokenizer = load_base(str(language_model / "model"))
    runner = PromptRunner(model, tokenizer, is_chat=True)
    asked = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    options = {"max_new_tokens": 4, "do_sample": False}
    [last] = runner.answer([runner.render(asked)], **options)
    completion = [*asked[1:], {"role": "assistant", "content": last}]
    rows = Dataset.from_dict({"prompt": [asked[:1]], "completion": [completion]})
    flags = Namespace(per_device_eval_batch_size=2, max_new_tokens=4)
    assert _count_exact(runner, rows, flags) == 1


def test_forgetting_at_each_scale(run, language_model, rows, tmp_path):
    adapter = shutil.copy(language_model / "adapter.safetensors", tmp_path)
    given = ("evaluate", "--base", language_model / "model", "--adapter", adapter, "--data", rows)
    found = run(*given, "--compare", "--scale", 0, 0.5, "--json").json
    assert found["scale 0"]["loss"] == pytest.approx(found["base"]["loss"])
    assert found["scale 0"]["forgetting"] == pytest.approx(0, abs=1e-6)
    assert 0.01 < found["scale 0.5"]["forgetting"] < found["adapter"]["forgetting"]
    assert (tmp_path / "forgetting.png").read_bytes()
    own = OwnText(**json.loads((tmp_path / "own-text.json").read_text()))
    model, _ = load_base(str(language_model / "model"))
    disha.load_adapter(model, adapter)
    assert found["adapter"]["forgetting"] == pytest.approx(own.forgotten(model), abs=1e-5)
    text = run(*given, "--forgetting").out
    assert f"{found['adapter']['forgetting']:.5g}" in text
    assert "scale" not in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "--data"),
        (("--data", "ROWS", "--base", "MODEL", "--forgetting"), "--adapter"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
        (("--data", "ROWS"), "name the model with --base or --adapter"),
        (("--data", "ROWS", "--base", "absent/model"), "absent/model"),
        (("--data", "ROWS", "--base", "MODEL", "--dataset_field", "x", "y"), "x"),
        (("--data", "TEXT", "--base", "MODEL", "--exact_match"), "a question and an answer"),
        (("--data", "ROWS", "--base", "MODEL", "--exact"), "--exact_match"),
    ],
)
def test_bad_input(run, language_model, rows, tmp_path, given, says):
    text = write(tmp_path / "text.jsonl", [{"text": "hello"}])
    names = {"MODEL": language_model / "model", "ROWS": rows, "TEXT": text}
    done = run("evaluate", *(names.get(word, word) for word in given))
    if "--exact" in given:  # a beginning of a flag stands for it
        assert done.code == 0
        return
    assert done.code == 2
    assert says in done.err
