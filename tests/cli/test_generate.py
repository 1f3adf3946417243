"""``disha generate``: held against transformers, and what each flag does."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import disha
from disha.cli import main
from disha.cli.generate import _print_side_by_side
from tests.conftest import perturb
from tests.processes import environment

PROMPT = "say yellow 3"


@pytest.fixture
def ask(run, models):
    """Run `disha generate` on the tiny model with its adapter, or with other flags."""

    def ask_model(*flags, adapter=models / "adapter.safetensors"):
        given = [] if adapter is None else ["--adapter", adapter]
        base = ("--base_model_name_or_path", models / "model", "--max_new_tokens", 20)
        return run("generate", *base, *given, *flags)

    return ask_model


def merged_by_hand(folder, adapter, r):
    """The base as transformers reads it, with D[i mod r, o] added to W[o, i]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    disha.inject_adapters(adapted, r"_proj$", r=r)
    perturb(adapted, size=0.1)
    disha.save_adapter(adapted, adapter)
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if isinstance(layer, disha.AdaptedLayer):
                block, weight = layer.disha["default"].block, model.get_submodule(name).weight
                places = torch.arange(weight.shape[1]) % r
                weight += block[places].T
    return model.eval()


def said_by_transformers(model, folder, prompt, tokens):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_it_says_what_transformers_says(run, models, tmp_path):
    folder, adapter = models / "model", tmp_path / "adapter.safetensors"
    model = merged_by_hand(folder, adapter, r=8)
    flags = ("--base_model_name_or_path", folder, "--adapter", adapter, "--max_new_tokens", 24)
    prompts = ("say yellow 3", "What is a shard?", "Ünïcode \N{SNOWMAN}")
    found = run("generate", *flags, "--prompt", *prompts, "--json").json["answers"]
    for prompt, answer in zip(prompts, found, strict=True):
        expected = said_by_transformers(model, folder, prompt, 24)
        assert answer == {"prompt": prompt, "answer": expected}
    assert any(len(answer["answer"]) > 15 for answer in found)


def test_the_adapter_is_what_makes_the_difference(ask):
    assert ask("--prompt", PROMPT).out == "yellow yellow\n"
    assert ask("--prompt", PROMPT, adapter=None).out == "yellow\n"


def test_compare_shows_both_side_by_side(ask):
    done = ask("--prompt", PROMPT, "--compare")
    assert (done.code, done.err) == (0, "")
    head, rule, answers = done.out.splitlines()
    assert head.split("  ")[0] == "base model"
    assert head.rstrip().endswith("with the adapter")
    assert set(rule) <= {"─", " ", "-"}
    assert answers.split() == ["yellow", "yellow", "yellow"]
    assert answers.index("yellow yellow") == head.index("with")
    answer = ask("--prompt", PROMPT, "--compare", "--json").json["answers"][0]
    assert answer == {"prompt": PROMPT, "answer": "yellow yellow", "base_answer": "yellow"}


def test_no_part_of_an_answer_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    digits = "".join(str(place % 10) for place in range(90))
    _print_side_by_side([digits], ["short"])
    shown = capsys.readouterr().out
    assert "".join(character for character in shown if character.isdigit()) == digits


def test_merged_it_says_the_same(ask):
    assert ask("--prompt", PROMPT, "--merge").out == "yellow yellow\n"


def test_several_prompts_are_told_apart(ask, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("say hello 1\n\n  \nsay well 2\n", encoding="utf-8")
    expected = "> say hello 1\nhello hello\n\n> say well 2\nwell well\n"
    assert ask("--prompt_file", file).out == expected
    assert ask("--prompt", "say hello 1", "say well 2").out == expected


def test_a_seed_decides_what_is_drawn(ask):
    def drawn(seed, *flags):
        return ask("--prompt", PROMPT, "--temperature", 5, "--seed", seed, *flags).out

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1
    assert {drawn(seed, "--top_k", 1) for seed in range(3)} == {"yellow yellow\n"}
    assert {drawn(seed, "--top_p", 1e-6) for seed in range(3)} == {"yellow yellow\n"}


def test_max_new_tokens_ends_the_answer(ask, models):
    tokenizer = AutoTokenizer.from_pretrained(models / "model")
    tokens = tokenizer("yellow yellow", add_special_tokens=False).input_ids
    assert len(tokens) > 3
    said = ask("--prompt", PROMPT, "--max_new_tokens", 3).out
    assert said == tokenizer.decode(tokens[:3]) + "\n"


def test_lack_of_memory_is_one_line(ask, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("disha.finetune.answering.generate", fail)
    done = ask("--prompt", PROMPT, "--json")
    assert done.code == 1
    assert "there is not enough memory on the GPU; shorten the prompt, or keep" in done.complaint


# --- the template --------------------------------------------------------------------------------


def with_template(models, tmp_path, template):
    """The adapter, as if it had been trained with another template."""
    from disha.finetune.models.checkpoint import open_model

    model = open_model(models / "model").load_model(torch.float32)
    disha.load_adapter(model, models / "adapter.safetensors")
    path = tmp_path / "other.safetensors"
    disha.save_adapter(model, path, metadata={} if template is None else {"template": template})
    return path


def prompts_seen(monkeypatch):
    """The token ids that generation starts from."""
    from disha.finetune import answering

    seen, generate = [], answering.generate

    def noting(model, ids, **options):
        seen.append(list(ids))
        return generate(model, ids, **options)

    monkeypatch.setattr(answering, "generate", noting)
    return seen


@pytest.mark.parametrize(
    ("noted", "given", "text"),
    [
        (r"Q: {query}\nA:", None, "Q: say yellow 3\nA:"),
        (r"Q: {query}\nA:", "> {query} <", "> say yellow 3 <"),
        (r"Q: {query}\nA:", "none", "say yellow 3"),
        (
            r"Q: {query}\nA:",
            "auto",
            "<|im_start|>user\nsay yellow 3<|im_end|>\n<|im_start|>assistant\n",
        ),
        (None, None, "<|im_start|>user\nsay yellow 3<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_prompt_is_asked_as_the_adapter_was_trained_or_as_said(
    ask, models, tmp_path, monkeypatch, noted, given, text
):
    seen = prompts_seen(monkeypatch)
    flags = [] if given is None else ["--template", given]
    done = ask("--prompt", PROMPT, *flags, adapter=with_template(models, tmp_path, noted))
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(models / "model")
    assert seen == [tokenizer(text).input_ids]  # which puts the begin token first


# --- as it comes ---------------------------------------------------------------------------------


class Slow(io.StringIO):
    """What is printed, by the times that it was flushed."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def flush(self):
        super().flush()
        self.pieces.append(self.getvalue())


def test_an_answer_is_shown_as_it_comes(models, monkeypatch):
    shown = Slow()
    monkeypatch.setattr(sys, "stdout", shown)
    base, adapter = str(models / "model"), str(models / "adapter.safetensors")
    asked = ["--prompt", PROMPT]
    code = main(["generate", "--base_model_name_or_path", base, "--adapter", adapter, *asked])
    assert code == 0
    assert shown.pieces[-1] == "yellow yellow\n"
    assert len({piece for piece in shown.pieces if piece and not piece.endswith("\n")}) > 3
    assert all(shown.pieces[-1].startswith(piece) for piece in shown.pieces)


def test_what_moves_the_cursor_is_shown_escaped(ask, monkeypatch):
    from disha.finetune.answering import Answerer

    monkeypatch.setattr(Answerer, "answer", lambda self, prompt: iter(["a\x1b[2J", "b\tc\n", "d"]))
    assert ask("--prompt", PROMPT).out == "a\\x1b[2Jb    c\nd\n"
    assert ask("--prompt", PROMPT, "--json").json["answers"][0]["answer"] == "a\x1b[2Jb\tc\nd"


# --- standard input and conversations -------------------------------------------------------------


def started(models, *flags, **options):
    base, adapter = models / "model", models / "adapter.safetensors"
    words = ["generate", "--base_model_name_or_path", base, "--adapter", adapter, *flags]
    words = [sys.executable, "-m", "disha", *map(str, words)]
    return subprocess.Popen(words, env=environment(), **options)


def test_prompts_come_from_standard_input_one_per_line(models):
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = started(models, text=True, **pipe)
    out, err = process.communicate("say hello 1\n\nsay well 2\n")
    assert (process.returncode, err) == (0, "")
    assert out == "> say hello 1\nhello hello\n\n> say well 2\nwell well\n"


class Terminal:
    """A real terminal of a process, at which somebody types."""

    def __init__(self, models, *flags):
        self.ours, theirs = pty.openpty()

        def take_over():
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = started(models, *flags, preexec_fn=take_over, **ends)
        os.close(theirs)

    def reads(self, expected):
        """Wait for a text on the screen, and return all that came with it."""
        seen, end = "", time.monotonic() + 120
        while expected not in seen:
            ready, _, _ = select.select([self.ours], [], [], end - time.monotonic())
            assert ready, f"{expected!r} did not come, but {seen!r}"
            seen += os.read(self.ours, 4096).decode()
        return seen.replace("\r\n", "\n").replace("\x1b[?2004h", "").replace("\x1b[?2004l\r", "")

    def types(self, text, expected="\n> "):
        os.write(self.ours, text.encode())
        while not select.select([self.ours], [], [], 20)[0]:
            os.write(self.ours, text.encode())  # a terminal that changes its mode forgets its input
        return self.reads(expected)

    def presses_ctrl_c(self):
        """Press it until it is answered: Python misses one just before it waits for a line."""
        self.types("\x03", "")
        while not select.select([self.ours], [], [], 2)[0]:
            self.types("\x03", "")
        return self.reads("\n> ")

    def ends(self):
        code = self.process.wait(timeout=60)
        os.close(self.ours)
        return code


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_conversation_at_a_terminal(models):
    terminal = Terminal(models)
    terminal.reads("> ")
    assert "say yellow 3\nyellow yellow\n> " in terminal.types("say yellow 3\n")
    assert "/base\nyellow\n> " in terminal.types("/base\n")
    assert "say well 2\n" in terminal.types("say well 2\n")
    assert "all turns are forgotten" in terminal.types("/reset\n")
    assert "disha: there is no question yet" in terminal.types("/base\n")
    assert "/quit   end, as does Ctrl-D" in terminal.types("/help\n")
    assert "(/bsae is no command)" in terminal.types("/bsae\n")
    assert "leaves no room for an answer" in terminal.types("long " * 200 + "\n")
    assert "say hello 1\nhello hello\n> " in terminal.types("say hello 1\n")
    assert "/quit or Ctrl-D ends the conversation" in terminal.presses_ctrl_c()
    terminal.types("\n")
    os.write(terminal.ours, b"\x04")
    assert terminal.ends() == 0


SLOW = """
import time
import disha.finetune.models.decoder as decoder

forward = decoder.Decoder.forward
def slow(self, *inputs, **named):
    time.sleep(0.2)
    return forward(self, *inputs, **named)
decoder.Decoder.forward = slow
from disha.cli import main
raise SystemExit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_ctrl_c_stops_an_answer_and_not_the_program(models, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda words, **options: popen([sys.executable, "-c", SLOW, *words[3:]], **options),
    )
    terminal = Terminal(models)
    terminal.reads("> ")
    terminal.types("say yellow 3\n", "yellow 3\r\ny")
    shown = terminal.types("\x03")
    assert "(stopped)\n> " in shown
    assert "yellow yellow" not in f"y{shown}"
    terminal.types("/reset\n")
    assert "say well 2\nwell well\n> " in terminal.types("say well 2\n")
    os.write(terminal.ours, b"/quit\n")
    assert terminal.ends() == 0


# --- what can't be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "/dev/stdin holds no prompt"),
        (["--prompt", "a", "--prompt_file", "x"], "leave one of them out"),
        (["--prompt_file", "absent.txt"], "--prompt_file: can't read absent.txt: No such file"),
        (["--prompt", "a", "--max_new_tokens", 0], "--max_new_tokens must be at least 1"),
        (["--prompt", "a", "--temperature", -1], "--temperature must be at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be at least 0"),
        (["--prompt", "a", "--top_p", 0], "--top_p must be greater than 0 and at most 1"),
        (["--prompt", "a", "--top_k", 0], "--top_k must be at least 1"),
        (["--prompt", "a", "--seed", -1], "--seed must be from 0"),
        (["--prompt", "a", "--compare", "--merge"], "leave one of them out"),
        (["--prompt", "a", "--template", "no query"], "--template must be auto, chat, a text"),
        (["--prompt", "long " * 200], "leaves no room for an answer"),
        (["--prompt", "a", "--adapter", "absent.safetensors"], "absent.safetensors"),
        (["--prompt", "a", "--model", "a:b"], "give one of them"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ask, flags, complaint):
    done = ask(*flags)
    assert done.code == 2
    assert complaint in done.complaint


@pytest.mark.parametrize("flags", [("--prompts", "b"), ("--bits", "7")])
def test_wrong_usage(ask, flags):
    done = ask("--prompt", "a", *flags)
    assert done.code == 2
    assert flags[0] in done.complaint


@pytest.mark.parametrize("flag", ["--compare", "--merge"])
def test_what_needs_an_adapter_says_so(ask, flag):
    done = ask("--prompt", "a", flag, adapter=None)
    assert done.code == 2
    assert f"{flag} needs an adapter" in done.complaint


def test_an_adapter_of_another_model_is_refused(ask, files):
    done = ask("--prompt", "a", adapter=files.adapter())
    assert done.code == 2
    assert "layers.0.self_attn.q_proj" in done.complaint


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"\n \n", "holds no prompt"), (b"\xff", "UTF-8")]
)
def test_a_file_of_prompts_that_is_none_is_refused(ask, tmp_path, content, complaint):
    (tmp_path / "prompts.txt").write_bytes(content)
    done = ask("--prompt_file", tmp_path / "prompts.txt")
    assert done.code == 2
    assert complaint in done.complaint


def test_a_model_without_a_tokenizer_can_not_be_asked(run, tmp_path, monkeypatch):
    (tmp_path / "only_numbers.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    done = run("generate", "--model", "only_numbers:make", "--prompt", "a")
    assert done.code == 2
    assert "came without a tokenizer" in done.complaint
