"""The mistakes of a user of the commands: exit 2, and one sentence with the flag or the file.

Each row is a command line and a part of what it complains with. Names in capitals are files that
`place` makes. No row needs a model, unless it names one.
"""

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.pages import ROOT

MISTAKES = {
    "generate": [
        (
            "--base x --prompt a --temperature -1",
            "--temperature: must be a number from 0, got '-1'",
        ),
        ("--base x --prompt a --temperature nan", "--temperature: must be a number from 0"),
        (
            "--base x --prompt a --max_new_tokens 0",
            "--max_new_tokens: must be a whole number from 1",
        ),
        ("--base x --prompt a --max_new_tokens 1.5", "--max_new_tokens: must be a whole number"),
        ("--base x --prompt a --top_p 7", "--top_p: must be a number from 0 to 1, got '7'"),
        ("--base x --prompt a --top_k -1", "--top_k: must be a whole number from 0"),
        ("--base x --prompt a --seed -1", "--seed: must be a whole number from 0"),
        ("--base x --prompt a --tools ABSENT", "--tools: can't read ABSENT: No such file"),
        ("--base x --prompt a --tools FOLDER", "--tools: can't read FOLDER: Is a directory"),
        ("--base x --prompt a --tools TEXT", "--tools: TEXT is no JSON"),
        ("--base x --prompt a --tools NO_UTF8", "--tools: NO_UTF8 is no JSON"),
        ("--base x --prompt a --tools OBJECT", "--tools: OBJECT holds no list"),
        ("--prompt a --adapter ''", "--adapter: is empty; name a file or a folder"),
        ("--prompt a --base ''", "name the model with --base or --adapter"),
        ("--prompt a", "name the model with --base or --adapter"),
        ("--base x --prompt ''", "a --prompt is empty"),
        ("--base x < NO_UTF8", "standard input is no UTF-8"),
        ("--prompt a --adapter ABSENT", "ABSENT"),
        ("--prompt a --adapter TEXT", "TEXT is not a complete safetensors file"),
        ("--prompt a --adapter EMPTY", "EMPTY is not a complete safetensors file"),
        ("--prompt a --adapter LONG", "its name is too long"),
        ("--base MODEL --prompt a --max_new_tokens 2048", "give at most 20"),
        ("--base MODEL --prompt LONG", "shorten it"),
        ("--base FOLDER --prompt a", "can't load FOLDER"),
        ("--base absent/model --prompt a", "absent/model"),
        ("--base MODEL --prompt a --bits 7", "argument --bits: invalid choice: '7'"),
        ("--base MODEL --prompt a --max_new_token x", "--max_new_tokens: must be a whole number"),
        ("--base MODEL --prompt a --temprature 1", "did you mean --temperature?"),
        ("--base TEXT --prompt a", "can't load TEXT"),
    ],
    "evaluate": [
        (
            "--base x --data y --max_length 0",
            "--max_seq_length: must be a whole number",
        ),
        (
            "--base x --data y --per_device_eval_batch_size 0",
            "--per_device_eval_batch_size: must be",
        ),
        ("--base x --data y --max_new_tokens 0", "--max_new_tokens: must be a whole number from 1"),
        ("--adapter x --data y --scale nan", "--scale: must be a number from"),
        ("--adapter x --data y --scale 0.5 inf", "--scale: must be a number from"),
        ("--base x --data y --forgetting", "only an adapter forgets; name it with --adapter"),
        ("--base x", "--data"),
        ("--base x --data ABSENT", "ABSENT"),
        ("--base x --data ''", "--data"),
        ("--base x --data EMPTY", "EMPTY"),
        ("--base x --data NO_UTF8", "NO_UTF8"),
        ("--base x --data ROWS --dataset_split rows", "ROWS"),
        ("--base MODEL --data ROWS --dataset_field x y", "x"),
        ("--base MODEL --data QUESTIONS", "answer"),
        ("--base MODEL --data PLAIN --exact_match", "--exact_match needs rows with a question and"),
    ],
    "inspect": [
        ("ABSENT", "can't read ABSENT: No such file or directory; check the path"),
        ("''", "file: is empty; name a file or a folder"),
        ("LONG", "its name is too long"),
        ("FOLDER", "can't read FOLDER"),
        ("EMPTY", "EMPTY is not a complete safetensors file"),
        ("TEXT", "TEXT is not a complete safetensors file"),
        ("WEIGHTS", "WEIGHTS is a safetensors file without a 'disha' entry"),
        ("BROKEN_PEFT", "adapter_config.json is no JSON object"),
        ("ADAPTER --base ABSENT", "ABSENT"),
        ("ADAPTER --base FOLDER", "FOLDER holds neither model.safetensors nor"),
        ("ADAPTER --bas x --json=3", "disha inspect"),
    ],
    "convert": [
        ("ADAPTER WEIGHTS --to disha", "WEIGHTS exists; choose another name, or set `overwrite`"),
        (
            "ADAPTER ABSENT --to peft --rank 4",
            "--rank is for --to lora and diffusers, not for --to peft",
        ),
        ("ADAPTER ABSENT --to peft --rank 0", "--rank: must be a whole number from 1"),
        ("ADAPTER ABSENT --to lora --rank 0", "--rank: must be a whole number from 1"),
        ("ADAPTER ABSENT --to lora --experts x", "--experts"),
        ("ADAPTER ABSENT --to diffusers", "name it with --component: unet, transformer"),
        ("ADAPTER ABSENT --to diffusers --component x", "has no component 'x'; allowed are"),
        ("ADAPTER ABSENT --to disha --component unet", "--component is for image models"),
        ("ADAPTER TEXT --to peft --overwrite", "TEXT"),
        ("ADAPTER TEXT/out --to disha", "TEXT/out"),
        ("ADAPTER '' --to disha", "out: is empty; name a file or a folder"),
        ("ADAPTER LONG --to disha", "its name is too long"),
        ("ADAPTER FOLDER --to disha --overwrite", "can't save to FOLDER: Is a directory"),
        ("ADAPTER ABSENT", "--to"),
        ("TEXT ABSENT --to disha", "TEXT is not a complete safetensors file"),
        ("FOLDER ABSENT --to disha", "can't read FOLDER"),
        ("BAT ABSENT --to lora", "rank"),
        ("ADAPTER ABSENT --to lora --base TEXT", "TEXT"),
    ],
    "merge": [
        ("BASE ADAPTER ABSENT --scale nan", "--scale: must be a number from"),
        ("BASE ADAPTER ''", "out: is empty; name a file or a folder"),
        ("BASE ADAPTER WEIGHTS", "WEIGHTS exists; choose another name, or set `overwrite`"),
        ("BASE ADAPTER BASE --overwrite", "the base is there; name another place"),
        (
            "BASE ADAPTER FULL --overwrite",
            "FULL is not a checkpoint, and all in it would be deleted",
        ),
        ("BASE ABSENT OUT", "ABSENT"),
        ("BASE TEXT OUT", "TEXT is not a complete safetensors file"),
        ("FOLDER ADAPTER OUT", "FOLDER holds neither"),
        ("ADAPTER OUT", "notes no base that can be used; name it too"),
        ("OTHER ADAPTER OUT", "is not the base of this adapter"),
        ("BASE ADAPTER TEXT/out", "TEXT/out"),
    ],
    "check-server": [
        ("http://localhost:9", "name the adapter with --adapter"),
        ("http://localhost:9 --adapter ABSENT", "ABSENT"),
        ("http://127.0.0.1:9 --adapter ADAPTER", "does not answer (Connection refused)"),
        ("localhost:9 --adapter ADAPTER", "address, such as http://localhost:8000"),
        ("http:// --adapter ADAPTER", "http:/v1/models does not answer (no host given)"),
    ],
}
ROWS = [(name, words, says) for name, rows in MISTAKES.items() for words, says in rows]

CLASS_NAME = re.compile(r"\b[A-Z]\w*(Error|Exception|Warning)\b")


@pytest.fixture
def place(files, language_model):
    """The files that rows name, by their names there."""
    paths = {
        name: files.path / name.lower()
        for name in (
            "ABSENT",
            "OUT",
            "FOLDER",
            "FULL",
            "TEXT",
            "EMPTY",
            "NO_UTF8",
            "OBJECT",
            "WEIGHTS",
        )
    }
    paths["FOLDER"].mkdir()
    paths["FULL"].mkdir()
    (paths["FULL"] / "x").touch()
    paths["TEXT"].write_text("hello")
    paths["EMPTY"].touch()
    paths["NO_UTF8"].write_bytes(b'{"query": "\xff\xfe", "response": "\xe4"}\n')
    paths["OBJECT"].write_text("{}")
    save_file({"x": torch.zeros(2)}, paths["WEIGHTS"])
    for name, row in (
        ("ROWS", {"query": "a", "response": "b"}),
        ("QUESTIONS", {"query": "a"}),
        ("PLAIN", {"text": "a"}),
    ):
        paths[name] = files.path / f"{name.lower()}.jsonl"
        paths[name].write_text(json.dumps(row) + "\n")
    paths["BROKEN_PEFT"] = files.path / "peft"
    paths["BROKEN_PEFT"].mkdir()
    (paths["BROKEN_PEFT"] / "adapter_config.json").write_text("[1")
    paths["LONG"] = files.path / ("a" * 5000)
    paths["MODEL"] = language_model / "model"
    paths["ADAPTER"] = files.adapter()
    paths["BAT"] = files.adapter("bat", method="bat")
    paths["BASE"] = files.base()
    paths["OTHER"] = files.base("other", seed=5)
    return paths


def fill(words, place):
    """Put paths in the place of the names of files."""
    for name, path in place.items():
        words = re.sub(rf"\b{name}\b", str(path), words)
    return words


@pytest.mark.parametrize(("name", "words", "says"), ROWS, ids=lambda value: value)
def test_a_mistake(run, files, place, monkeypatch, name, words, says):
    words, _, piped = words.partition(" < ")
    if piped:
        bytes_of = io.BytesIO(place[piped].read_bytes())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(bytes_of, encoding="utf-8"))
    given = [fill(word, place) if word != "''" else "" for word in words.split()]
    before = files.names()
    done = run(name, *given)
    assert (done.code, done.out) == (2, "")
    assert files.names() == before
    told = done.err.splitlines()[-1]  # after bars of progress
    assert fill(says, place) in told
    assert not CLASS_NAME.search(told)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # Python's mark of a module that must not be imported
from disha.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "words",
    [
        "generate --base x --prompt a --top_p 7",
        "generate --base x --prompt a --tools absent",
        "generate --prompt a",
        "evaluate --adapter x --data y --scale nan",
        "evaluate --base x --data y --max_new_tokens 0",
    ],
)
def test_flags_are_checked_before_torch_is_imported(words):
    command = [sys.executable, "-c", WITHOUT_TORCH, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "torch" not in done.stderr


def test_the_default_length_fits_into_the_positions_of_a_model(run, language_model):
    prompt = "a" * 2000
    done = run("generate", "--base", language_model / "model", "--prompt", prompt, "--json")
    assert done.code == 0
    assert len(json.loads(done.out)["answer"]) <= 48
