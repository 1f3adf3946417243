import importlib.metadata
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaMLP
from trl.chat_template_utils import qwen3_chat_template
from trl.trainer import utils as trl_utils

import disha
from disha import AdapterFileWarning, ArgumentError
from disha.cli import main as disha_command
from disha.finetune import main, train, trainer
from disha.finetune.arguments import TrainingArguments, parse_flags
from disha.finetune.base import load_base
from disha.finetune.forgetting import OwnText
from disha.finetune.notes import read_noted_base, read_noted_bits, read_notes
from disha.finetune.tokenizer import load_tokenizer
from tests.conftest import assert_same
from tests.finetune import tiny_gguf
from tests.finetune.conftest import EXACT, Result
from tests.finetune.tiny_models import (
    CHATML,
    FAMILIES,
    MARKED_WITHOUT_END,
    rows,
    write_model,
    write_rows,
)

AUTHORS = shlex.split(
    """--init_weights True --bits bf16 --dataset_split train[:100000]
--dataset_field query response --bf16 True --num_train_epochs 1 --per_device_train_batch_size 2
--gradient_accumulation_steps 8 --save_strategy steps --save_steps 1000 --save_total_limit 1
--logging_steps 1 --learning_rate 2e-2 --weight_decay 0. --warmup_ratio 0.03 --tf32 True
--report_to none"""
)
"""The command of the author's script, but for names and the learning rate."""

AS_THEY_ARE = '{"skip_prepare_dataset": true}'
TALK = [{"role": "user", "content": "say two"}, {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def authors(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("authors") / "output" / "bone"
    words = ["--base_model_name_or_path", str(tiny), "--data_path", str(data)]
    words += ["--output_dir", str(folder), "--bone_r", "8", *AUTHORS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("disha.finetune.arguments.is_torch_tf32_available", lambda: False)
        with pytest.warns(match="--tf32 does nothing"):
            assert main(words) == 0
    return Result(folder)


class TestResults:
    def test_files(self, authors):
        names = {path.name for path in authors.folder.iterdir()}
        assert {"adapter.safetensors", "loss.png", "samples.md", "report.json"} < names
        assert (authors.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert (authors.folder / "samples.md").read_text().count("**With adapter**") == 3
        cards = list(authors.folder.rglob("README.md"))  # trl's knows no adapter file
        assert cards == [authors.folder / "README.md"]

    def test_card(self, authors, tiny, data):
        card = (authors.folder / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        assert head == {"library_name": "disha", "tags": ["adapter", "disha", "miss"]}
        for line in (f"| base | {tiny} |", "| method | bone, r = 8 |", f"| rows | 48 of {data} |"):
            assert line in card
        assert f"| training loss | {authors.losses[0]:.3f} -> " in card
        assert "The license is\nyours to choose" in card

    def test_a_readme_of_others_stays(self, finetune, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        finetune(tmp_path, "--max_steps", 1)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_report(self, authors):
        report = authors.report
        assert report["steps"] == 3
        assert report["rows"] == {"training": 48, "measured": 48}
        assert authors.losses[3] < authors.losses[0] - 0.05
        assert report["proof"]["loaded"] == pytest.approx(report["proof"]["trained"], abs=1e-6)
        assert report["settings"]["r"] == 8
        assert report["versions"]["disha"] == disha.__version__
        assert report["versions"]["torch"] == importlib.metadata.version("torch")
        assert report["seconds"] > 0
        assert set(report["samples"][0]) == {"prompt", "without", "with_adapter", "reference"}

    def test_forgetting(self, authors, tiny):
        own = OwnText(**json.loads((authors.folder / "own-text.json").read_text()))
        model, _ = load_base(str(tiny), "bf16")
        disha.load_adapter(model, authors.adapter)
        assert authors.report["forgetting"] == pytest.approx(own.forgotten(model), abs=1e-5)

    def test_the_adapter_notes_its_base(self, authors, tiny):
        assert read_noted_base(authors.adapter, read_notes(authors.adapter)) == str(tiny)
        assert read_noted_bits(read_notes(authors.adapter)) == "bf16"
        assert disha.inspect_adapter(authors.adapter).metadata["prompt"] == "text"

    def test_the_head_is_left_out(self, authors):
        names = [layer.name for layer in disha.inspect_adapter(authors.adapter).layers]
        assert len(names) == 14
        assert "lm_head" not in names

    def test_weights_that_get_no_gradient_are_named(self, finetune, tmp_path, monkeypatch):
        forward = LlamaMLP.forward
        monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: forward(mlp, x).detach())
        with pytest.warns(UserWarning, match="5 more: .* a custom function stops its gradient"):
            finetune(tmp_path / "run")

    def test_a_file_that_is_not_what_was_trained_is_an_error(self, finetune, tmp_path, monkeypatch):
        save = disha.save_adapter

        def save_other(model, path, *given, **named):
            with torch.no_grad():
                for block in disha.adapter_parameters(model):
                    block += 1
            save(model, path, *given, **named)
            with torch.no_grad():
                for block in disha.adapter_parameters(model):
                    block -= 1

        monkeypatch.setattr(disha, "save_adapter", save_other)
        with pytest.raises(disha.DishaError, match="do not use the file"):
            finetune(tmp_path)
        assert not (tmp_path / "adapter.safetensors").exists()
        assert (tmp_path / "unproven-adapter.safetensors").exists()


@pytest.fixture
def evaluated(capsys):
    """Return what `disha evaluate` measures of a model: part -> its loss, and more."""

    def measured(*words):
        capsys.readouterr()
        assert disha_command(["evaluate", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return measured


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, finetune, data, tmp_path, evaluated):
    base, merged = write_model(tmp_path / "base", family), tmp_path / "merged"
    result = finetune(tmp_path / "out", "--r", 4, base=base)
    assert result.losses[6] < result.losses[0] - 0.01
    proof = result.report["proof"]
    assert proof["loaded"] == pytest.approx(proof["trained"], abs=1e-5)

    words = ["--adapter", str(result.adapter), "--prompt", "say two 3", "--max_new_tokens", "4"]
    assert disha_command(["generate", *words]) == 0
    assert disha_command(["merge", str(result.adapter), str(merged)]) == 0
    loss = evaluated("--adapter", result.adapter, "--data", data)["adapter"]["loss"]
    assert loss == pytest.approx(proof["trained"], abs=0.02)
    of_merged = evaluated("--base", merged, "--data", data)["base"]["loss"]
    assert of_merged == pytest.approx(loss, abs=1e-4)


class TestBases:
    def test_gguf(self, finetune, tmp_path):
        state = tiny_gguf.random_state(tied=True)
        base = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state)
        result = finetune(tmp_path / "out", base=base)
        assert result.losses[6] < result.losses[0]
        assert read_noted_base(result.adapter, read_notes(result.adapter)) == str(base)
        assert read_noted_bits(read_notes(result.adapter)) == "fp32"

    @pytest.mark.parametrize("bits", ["4", "8"])
    def test_bits(self, finetune, data, tmp_path, bits, evaluated):
        """From training to an answer, also with a norm that must be the base's where it counts."""
        base = write_model(tmp_path / "base", "Mixtral")
        words = ["--bits", bits, "--also_train", "norm", "--samples", 1]
        result = finetune(tmp_path / "out", *words, base=base)
        assert result.losses[6] < result.losses[0]
        assert {block.dtype for block in result.blocks().values()} == {torch.float32}
        assert result.report["settings"]["bits"] == bits
        [sample] = result.report["samples"]
        assert sample["without"] != sample["with_adapter"]
        alone = evaluated("--base", base, "--bits", bits, "--data", data)["base"]["loss"]
        both = evaluated("--adapter", result.adapter, "--compare", "--data", data)
        assert both["base"]["loss"] == pytest.approx(alone, abs=2e-3)
        assert both["adapter"]["loss"] == pytest.approx(result.losses[6], abs=0.02)
        asked = ["--adapter", str(result.adapter), "--prompt", "say two 3"]
        assert disha_command(["generate", *asked, "--max_new_tokens", "3"]) == 0

    @pytest.mark.parametrize(
        "words",
        [["--also_train", "norm"], ["--method", "bat"], ["--method", "lora"], ["--groups", "2"]],
    )
    def test_float16_with_scaled_losses(self, finetune, tmp_path, capsys, monkeypatch, words):
        """What a device without bfloat16 chooses. accelerate scales no losses on a processor."""

        class Scaling(Accelerator):
            def __init__(self, *given, **named):
                super().__init__(*given, **named)
                self.native_amp = True
                self.scaler = torch.amp.GradScaler("cpu")

        monkeypatch.setattr("transformers.trainer.Accelerator", Scaling)
        old = torch.device("cuda")
        monkeypatch.setattr("disha.finetune.arguments.best_device", lambda: old)
        monkeypatch.setattr("disha.finetune.arguments.has_bfloat16", lambda kind: False)
        result = finetune(tmp_path / "out", *words)
        line = "--bits fp16 (the device has no bfloat16; losses are scaled)"
        assert line in capsys.readouterr().out
        assert result.losses[6] < result.losses[0]
        assert {block.dtype for block in result.blocks().values()} == {torch.float32}
        assert (result.folder / "checkpoint-6" / "scaler.pt").exists()

    def test_merging_onto_gguf_is_refused_before_training(self, finetune, tmp_path):
        with pytest.raises(ArgumentError, match="can't be merged into a GGUF file"):
            finetune(tmp_path / "out", "--merge", base=tmp_path / "tiny.gguf")
        assert not (tmp_path / "out").exists()


def test_merging_into_the_base_is_refused_before_training(finetune, tmp_path):
    base = write_model(tmp_path / "base")
    with pytest.raises(ArgumentError, match=r"can't write to .*merged: the base is there"):
        finetune(base / "out", "--merge", base=base)
    assert not (base / "out").exists()


def test_merge(finetune, tmp_path, tiny):
    result = finetune(tmp_path, "--merge")
    merged, words = load_base(str(tmp_path / "merged"))
    model, _ = load_base(str(tiny))
    disha.load_adapter(model, result.adapter)
    ids = words("say two 3", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_chat_model_learns_by_its_template(finetune, tmp_path, chatty):
    talk = [{"from": "human", "value": "say two"}, {"from": "gpt", "value": "two"}]
    path = write_rows(tmp_path / "talk.jsonl", [{"conversations": talk}] * 8)
    result = finetune(tmp_path / "out", "--data", path, "--samples", 1, base=chatty)
    assert disha.inspect_adapter(result.adapter).metadata["prompt"] == "chat"
    assert result.report["samples"][0]["prompt"].endswith("assistant\n")
    assert result.report["samples"][0]["reference"] == "two\n"


def test_a_template_that_was_given_goes_where_the_adapter_goes(finetune, tmp_path, data, evaluated):
    """Into the merged folder, and to each command; the adapter is trained further with it too."""
    template = tmp_path / "template.txt"
    template.write_text(CHATML)
    result = finetune(tmp_path / "out", "--chat_template_path", template, "--merge")
    assert disha.inspect_adapter(result.adapter).metadata["prompt"] == "chat"
    merged = tmp_path / "by command"
    assert disha_command(["merge", str(result.adapter), str(merged)]) == 0
    for folder in (result.folder / "merged", merged):
        assert load_base(str(folder))[1].chat_template == CHATML
        assert load_base(str(folder))[0].generation_config.eos_token_id == [2, 4]  # <|im_end|> too
    loss = evaluated("--adapter", result.adapter, "--data", data)["adapter"]["loss"]
    assert loss == pytest.approx(result.losses[6], abs=0.02)
    talk = write_rows(tmp_path / "talk.jsonl", [{"messages": TALK}] * 8)
    for form in ("peft", "lora"):
        folder = tmp_path / form
        assert disha_command(["convert", str(result.adapter), str(folder), "--to", form]) == 0
        of_folder = evaluated("--adapter", folder, "--data", data)["adapter"]["loss"]
        assert of_folder == pytest.approx(loss, abs=1e-4)
    for adapter in (result.adapter, tmp_path / "lora"):
        words = ["--adapter", adapter, "--data", talk, "--overwrite_output_dir"]
        further = finetune(tmp_path / "further", *words, base=None)
        assert disha.inspect_adapter(further.adapter).metadata["chat_template"] == CHATML


class TestHeldOutRows:
    @pytest.fixture
    def mixed(self, tmp_path, data):
        """The flags of two files, of 48 rows and of 8, which are drawn as often."""
        more = write_rows(tmp_path / "more.jsonl", rows(8))
        return ["--data", data, more, "--data_weights", 1, 1]

    def test_of_another_file(self, finetune, tmp_path, mixed):
        words = ["--eval_data", tmp_path / "more.jsonl", "--eval_split", "train[:4]"]
        report = finetune(tmp_path / "out", *mixed, *words).report
        assert report["measured_on"] == "held-out"
        assert report["rows"]["measured"] == 4

    def test_of_another_form(self, finetune, tmp_path):
        """Texts, where trl learns the marked answers of the conversations to train on."""
        (tmp_path / "qwen3.jinja").write_text(qwen3_chat_template)
        texts = write_rows(tmp_path / "texts.jsonl", [{"text": "say two"}])
        words = ["--chat_template_path", tmp_path / "qwen3.jinja", "--eval_data", texts]
        proof = finetune(tmp_path / "out", *words, "--max_steps", 1).report["proof"]
        assert proof["loaded"] == pytest.approx(proof["trained"], abs=1e-6)

    def test_of_a_part_of_each_file(self, finetune, tmp_path, mixed):
        report = finetune(tmp_path / "out", *mixed, "--eval_split", "train[:4]").report
        assert report["rows"]["measured"] == 8

    def test_of_one_file(self, finetune, tmp_path):
        report = finetune(tmp_path, "--eval_fraction", 0.25).report
        assert report["rows"] == {"training": 36, "measured": 12}

    def test_of_several_files_none_is_drawn_twice(self, finetune, tmp_path, mixed):
        report = finetune(tmp_path / "out", *mixed, "--eval_fraction", 0.25).report
        assert report["rows"]["measured"] == 14


class TestCourse:
    def test_best_checkpoint(self, finetune, tmp_path):
        words = ["--eval_fraction", 0.25, "--eval_strategy", "steps", "--eval_steps", 2]
        words += ["--save_steps", 2, "--learning_rate", 0.3, "--lr_scheduler_type", "constant"]
        result = finetune(tmp_path, *words, "--load_best_model_at_end")
        best = min(result.losses, key=lambda step: result.losses[step] if step else 99)
        assert result.report["best_step"] == best
        assert result.report["proof"]["trained"] == pytest.approx(result.losses[best], abs=1e-6)

    def test_without_a_checkpoint_of_the_best_step_the_last_one_is_kept(self, finetune, tmp_path):
        words = ["--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end"]
        words += ["--learning_rate", 3, "--lr_scheduler_type", "constant", "--warmup_steps", 0]
        with pytest.warns(UserWarning, match="the best step, [12], has no checkpoint"):
            result = finetune(tmp_path, *words, "--max_steps", 3)
        assert result.report["best_step"] is None
        assert result.report["proof"]["trained"] == result.losses[3]

    @pytest.mark.parametrize("words", [[], ["--load_best_model_at_end"]])
    def test_early_stopping(self, finetune, tmp_path, words):
        words = [*words, "--eval_fraction", 0.25, "--eval_strategy", "steps", "--eval_steps", 2]
        words += ["--save_steps", 2, "--learning_rate", 3, "--lr_scheduler_type", "constant"]
        words += ["--early_stopping_patience", 1, "--max_steps", 60]
        assert finetune(tmp_path, *words).report["steps"] < 60

    def test_an_adapter_is_trained_further(self, finetune, authors, tmp_path):
        words = ["--adapter", authors.adapter, "--max_steps", 3]
        result = finetune(tmp_path, *words, base=None)
        assert result.losses[0] == pytest.approx(authors.report["proof"]["trained"], abs=1e-2)
        assert read_noted_bits(read_notes(result.adapter)) == "bf16"  # as the authors' run
        assert read_noted_base(result.adapter, read_notes(result.adapter)) == read_noted_base(
            authors.adapter, read_notes(authors.adapter)
        )
        assert result.blocks().keys() == authors.blocks().keys()

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--r", 4], "has r=8, which can't change; leave out --r"),
            (["--method", "bone"], "has method=bat"),
            (["--groups", "2"], "has groups=1"),
            (["--init_weights", "True"], "has method=bat"),
            (["--target", "q_proj"], "has target="),
            (["--also_train", "norm"], "has also_train="),
            (["--rank_pattern", "v=4"], "has rank_pattern="),
            (["--dropout=0.5"], "has dropout=0.0"),
            (["--rank", 64], "has r=8"),
        ],
    )
    def test_what_an_adapter_sets_can_not_be_set(self, finetune, tiny, tmp_path, words, says):
        path = tmp_path / "adapter.safetensors"
        model, _ = load_base(str(tiny))
        disha.inject_adapters(model, "v_proj", r=8, method="bat")
        disha.save_adapter(model, path)
        with pytest.raises(ArgumentError, match=says):
            finetune(tmp_path / "out", "--adapter", path, *words)

    def test_groups_and_no_target_are_taken_from_the_file(self, finetune, tiny, tmp_path):
        """A combined adapter has no target; flags may say what the file says."""
        model, _ = load_base(str(tiny))
        for name, target in (("a", "v_proj"), ("b", "q_proj")):
            disha.inject_adapters(model, target, r=8, method="bone_groups_all", adapter=name)
        disha.combine_adapters(model, {"a": 1, "b": 1}, "sum")
        disha.save_adapter(model, tmp_path / "adapter.safetensors", "sum")
        words = ["--adapter", tmp_path / "adapter.safetensors", "--groups", "all"]
        words += ["--method", "miss"]
        settings = finetune(tmp_path / "out", *words).report["settings"]
        assert (settings["method"], settings["groups"]) == ("bone", "all")
        assert settings["target"] == []

    def test_the_report_has_the_settings_of_an_adapter_that_is_trained_further(
        self, tiny, data, authors, tmp_path
    ):
        words = ["--adapter", authors.adapter, "--data", data, "--output_dir", tmp_path]
        assert main([*map(str, words), "--max_steps", "1", "--bits", "fp32"]) == 0
        settings = Result(tmp_path).report["settings"]
        assert (settings["r"], settings["method"], settings["bits"]) == (8, "bone", "fp32")
        assert settings["base"] == str(tiny)
        held = parse_flags(["--adapter", str(authors.adapter), "--base", str(tiny)])[0].bits
        assert held == "bf16"  # as the file notes it, also on a base that is given

    def test_an_adapter_of_another_base(self, finetune, authors, tmp_path):
        other = write_model(tmp_path / "other", seed=1)
        with pytest.raises(AdapterFileWarning, match="other base"):
            finetune(tmp_path / "out", "--adapter", authors.adapter, base=other)

    def test_packed_rows_are_proved_as_they_are(self, finetune, chatty, tmp_path):
        words = ["--packing", "--max_length", 64, "--samples", 1]
        found = finetune(tmp_path, *words, base=chatty)
        [sample] = found.report["samples"]
        assert sample["reference"].strip() in [row["response"] for row in rows()]
        assert found.report["rows"] == {"training": 48, "measured": 48}
        assert disha.inspect_adapter(found.adapter).metadata["prompt"] == "chat"

    def test_rows_that_need_no_preparing_are_counted(self, finetune, tmp_path):
        row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
        data = write_rows(tmp_path / "rows.jsonl", [row] * 8)
        words = ["--data", data, "--dataset_kwargs", AS_THEY_ARE, "--max_steps", 1]
        report = finetune(tmp_path / "out", *words).report
        assert report["rows"] == {"training": 8, "measured": 8}

    def test_a_packed_row_may_have_nothing_to_learn(self, finetune, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [{"query": "q" * 40, "response": "a"}] * 2)
        words = [
            "--packing",
            "--packing_strategy",
            "bfd_split",
            "--max_length",
            8,
            "--max_steps",
            1,
        ]
        assert finetune(tmp_path / "out", "--data", data, *words).report["steps"] == 1

    def test_tensorboard(self, finetune, tmp_path, monkeypatch):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        finetune(tmp_path / "out", "--report_to", "tensorboard", "--logging_steps", 2)
        events = EventAccumulator(str(tmp_path / "board")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
        assert events.Scalars("eval/loss")

    def test_dry_run_writes_nothing(self, tiny, data, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = ["--base", str(tiny), "--data", str(data), "--r", "8", "--dry_run"]
        assert main([*words, "--num_train_epochs", "2", "--gradient_accumulation_steps", "5"]) == 0
        shown = capsys.readouterr().out
        fits = r"it needs .* GiB .*: program .*, base .*, activations .*\nit fits: cpu has .* GiB\n"
        assert "model.layers.0-1.mlp.down_proj: 2 x 128 -> 64, bone, r = 8, 512 parameters" in shown
        assert "[[" in shown
        assert re.search(rf"\ntrainable 9,216 of .*, 6 steps\n{fits}$", shown)
        assert len(shown.splitlines()) < 24
        assert not list(tmp_path.iterdir())

    def test_one_of_several_processes_shows_the_dry_run(self, tiny, data, capsys, monkeypatch):
        """Simulated: this is the second process."""
        monkeypatch.setattr(TrainingArguments, "process_index", 1)
        assert main(["--base", str(tiny), "--data", str(data), "--r", "8", "--dry_run"]) == 0
        assert capsys.readouterr().out == ""

    def test_a_dry_run_that_does_not_fit_says_what_to_change(self, tiny, data, capsys, monkeypatch):
        monkeypatch.setattr("disha.finetune.preview.free_memory", lambda device: 2**20)
        assert main(["--base", str(tiny), "--data", str(data), "--r", "8", "--dry_run"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == (
            "it does not fit: cpu has 0.00 GiB; try --gradient_checkpointing, a smaller "
            "--per_device_train_batch_size or --max_length, --bits 4"
        )

    @pytest.mark.parametrize("further", [False, True])
    def test_a_dry_run_reads_no_weight(self, further, authors, tiny, data, tmp_path):
        ignored = shutil.ignore_patterns("*.safetensors")
        base = shutil.copytree(tiny, tmp_path / "base", ignore=ignored)
        words = ["--base", base, "--data", data, "--dry_run"]
        words += ["--adapter", authors.adapter] if further else ["--new_tokens", "<think>"]
        assert main([str(word) for word in words]) == 0

    @pytest.mark.parametrize(
        ("flag", "all_of_it"),
        [
            ("--completion_only_loss True", False),
            ("--completion_only_loss False", True),
            ("--assistant_only_loss False", True),
        ],
    )
    def test_questions_are_learned_too_if_asked(
        self, flag, all_of_it, tiny, data, tmp_path, capsys
    ):
        """Also where trl can mark the answers in the template."""
        template = tmp_path / "qwen3.jinja"
        template.write_text(qwen3_chat_template)
        words = f"--base {tiny} --data {data} --r 8 --dry_run --chat_template_path {template}"
        assert main([*words.split(), *flag.split()]) == 0
        assert ("[[<|im_start|>user" in capsys.readouterr().out) == all_of_it

    def test_answers_alone_are_learned_with_their_end(self, tiny, data, tmp_path, capsys):
        """Also if that is asked for, and the template marks answers without their end."""
        template = tmp_path / "without_end.jinja"
        template.write_text(MARKED_WITHOUT_END)
        words = f"--base {tiny} --data {data} --r 8 --dry_run --chat_template_path {template}"
        words += " --assistant_only_loss True --completion_only_loss False"
        assert main(words.split()) == 0
        shown = capsys.readouterr().out
        assert "<|im_end|>[[" in shown  # the question is not learned
        assert "<|im_end|>]]" in shown

    @pytest.mark.parametrize("flag", ["--assistant_only_loss", "--completion_only_loss"])
    def test_whole_conversations_are_learned_if_asked(self, flag, chatty, tmp_path, capsys):
        messages = [*TALK, {"role": "user", "content": "the end"}]
        data = write_rows(tmp_path / "talks.jsonl", [{"messages": messages}] * 4)
        words = f"--base {chatty} --data {data} --r 8 --dry_run {flag} False"
        assert main(words.split()) == 0
        shown = capsys.readouterr().out
        assert "[[<|im_start|>user" in shown
        assert "the end<|im_end|>\n]]" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.jsonl"], "can't read none.jsonl"),
        (["--dataset_field", "question", "answer"], "have the fields query, response"),
        (["--early_stopping_patience", 3], "--early_stopping_patience needs an --eval_strategy"),
        (["--dataset_split", "dev"], "dev"),
        (["--dataset_split", "train", "train"], "one for each"),
        (["--base", "./none"], "can't load ./none"),
        (["--r", "65"], "r=65"),
        (["--target", "nothing"], "selects no layer"),
        (["--report_to", "nobody"], "nobody"),
        (["--dataset_kwargs", AS_THEY_ARE], "must have input_ids and labels"),
        (["--dry_run", "--attn_implementation", "nonsense"], "can't load .*nonsense"),
    ],
)
def test_bad_input(finetune, tmp_path, words, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        finetune(tmp_path / "out", *words)
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rate(finetune, tmp_path):
    words = ["--learning_rate", 1e30, "--max_grad_norm", 0, "--logging_steps", 1]
    with pytest.raises(disha.DishaError, match=r"the loss is (nan|inf) at step \d, .* of 1e\+30"):
        finetune(tmp_path, *words, "--lr_scheduler_type", "constant", "--warmup_steps", 0)


def test_attention_is_computed_as_the_flag_says(tiny):
    model, _ = load_base(str(tiny), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match=r"can't load .*nonsense"):
        load_base(str(tiny), attn_implementation="nonsense")


def test_trl_is_left_as_it_was():
    before = dict(vars(trl_utils))
    with trainer.score_learned_positions():
        assert trl_utils._use_triton("cpu")
    assert vars(trl_utils) == before


@pytest.mark.parametrize(("words", "flag"), [([], "--base"), (["--base", "model"], "--data")])
def test_what_must_be_named(words, flag):
    with pytest.raises(ArgumentError, match=f"name .* with {flag}"):
        main(words)


@pytest.mark.parametrize("words", [[], ["--packing", True], ["--also_train", "lm_head"]])
def test_only_learned_positions_are_scored_on_a_cpu(words, finetune, tmp_path, monkeypatch):
    few = write_rows(tmp_path / "rows.jsonl", rows(12))
    words = [*EXACT, *words, "--data", few]
    words += ["--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]

    def run(name):
        with FlopCounterMode(display=False) as counter:
            result = finetune(tmp_path / name, *words)
        state = json.loads((tmp_path / name / "checkpoint-2/trainer_state.json").read_text())
        metrics = {"loss", "eval_loss", "entropy", "eval_entropy", "mean_token_accuracy"}
        logged = [log[key] for log in state["log_history"] for key in metrics & log.keys()]
        counts = counter.get_flop_counts()["Global"].items()  # torch 2.15 counts attention too
        products = sum(count for operation, count in counts if "attention" not in str(operation))
        return result.blocks(), logged, products

    blocks, logged, work = run("learned")
    monkeypatch.setattr(trainer, "score_learned_positions", nullcontext)
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: False)
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    all_blocks, all_logged, all_work = run("all")
    assert logged == pytest.approx(all_logged, rel=1e-5)
    torch.testing.assert_close(blocks, all_blocks, rtol=1e-4, atol=1e-6)
    assert work < 0.95 * all_work


def test_a_row_that_can_not_be_used_is_told_before_the_base_is_loaded(
    finetune, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_base", lambda *given: pytest.fail("the base was loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "say", "response": "two"}\n{"query": "say", "response": null}\n')
    with pytest.raises(ArgumentError, match="row 2"):
        finetune(tmp_path / "out", "--data", rows)


def test_a_checkpoint_holds_what_the_final_file_holds(finetune, tmp_path, tiny, chatty, capsys):
    words = ["--chat_template_path", chatty, "--new_tokens", "<think>", "--eos_token", "<|im_end|>"]
    final = finetune(tmp_path / "out", *words, "--save_steps", 6).adapter
    checkpoint = tmp_path / "out" / "checkpoint-6"
    notes, expected = (dict(disha.inspect_adapter(path).metadata) for path in (checkpoint, final))
    assert (
        read_noted_base(checkpoint, read_notes(checkpoint))
        == read_noted_base(final, read_notes(final))
        == str(tiny)
    )
    assert read_noted_bits(notes) == read_noted_bits(expected) == "fp32"
    assert {**notes, "base": ""} == {**expected, "base": ""}
    assert {"prompt", "chat_template", "new_tokens", "eos_token"} < notes.keys()
    assert notes["chat_template"] == CHATML
    assert json.loads(final.with_name("report.json").read_text())["settings"]["eos_token"] == (
        "<|im_end|>"
    )
    assert load_base(str(tiny), notes=notes)[1].eos_token == "<|im_end|>"
    said = []
    for path in (checkpoint, final):
        capsys.readouterr()
        words = ["--adapter", str(path), "--prompt", "say two 3", "--max_new_tokens", "4"]
        assert disha_command(["generate", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@dataclass
class NewTokens:
    """A run that learns two new tokens, which stand in every answer."""

    tied: bool
    base: Path
    answers: Path
    flags: list
    result: Result

    def adapter(self):
        return str(self.result.adapter)

    def models(self, folder):
        """The flags of the adapter, of the base that the run has merged, and of one merged here."""
        merged = folder / "merged"
        assert disha_command(["merge", self.adapter(), str(merged)]) == 0
        yield ["--adapter", self.adapter()]
        yield ["--base", str(self.result.folder / "merged")]
        yield ["--base", str(merged)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def new_tokens(request, finetune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_tokens")
    base = write_model(folder / "base", tie_word_embeddings=request.param)
    thought = [{**row, "response": f"<think>{row['response']}</think>"} for row in rows()]
    answers = write_rows(folder / "rows.jsonl", thought)
    flags = ["--data", answers, "--new_tokens", "<think>", "</think>"]
    flags += ["--max_steps", 60, "--save_steps", 30, "--learning_rate", 0.005]
    result = finetune(folder / "out", *flags, "--merge", base=base)
    return NewTokens(request.param, base, answers, flags, result)


class TestNewTokens:
    def test_their_rows_train_and_are_proved(self, new_tokens):
        size = len(load_base(str(new_tokens.base))[0].lm_head.weight)
        layers = disha.inspect_adapter(new_tokens.adapter()).layers
        trained = [layer.outputs for layer in layers if layer.method == "rows"]
        tables = 1 if new_tokens.tied else 2
        assert trained == [((size, size + 1), (size + 1, size + 2))] * tables
        proof = new_tokens.result.report["proof"]
        assert proof["loaded"] == pytest.approx(proof["trained"])
        words, _ = load_tokenizer(str(new_tokens.base), read_notes(new_tokens.adapter()))
        assert words.convert_tokens_to_ids("</think>") > size

    def test_one_that_is_named_twice_has_one_row(self, finetune, tiny, tmp_path):
        result = finetune(tmp_path, "--new_tokens", "<think>", "<think>", "--max_steps", 1)
        layers = disha.inspect_adapter(result.adapter).layers
        size = len(load_base(str(tiny))[0].lm_head.weight)
        assert {layer.outputs for layer in layers if layer.method == "rows"} == {
            ((size, size + 1),)
        }

    def test_all_commands_know_them(self, new_tokens, tmp_path, capsys, evaluated):
        for model in new_tokens.models(tmp_path):
            capsys.readouterr()
            asked = ["--prompt", "say two 3", "--max_new_tokens", "8"]
            assert disha_command(["generate", *model, *asked]) == 0
            answer = capsys.readouterr().out
            assert "<think>" in answer
            assert "</think>" in answer
            measured = evaluated(*model, "--data", new_tokens.answers)
            name = "adapter" if "adapter" in measured else "base"
            losses = new_tokens.result.losses
            assert measured[name]["loss"] == pytest.approx(losses[60], abs=0.02)

    def test_they_go_where_the_adapter_goes(self, new_tokens, tmp_path):
        """Converted to a LoRA, the base answers as with them merged."""
        lora = str(tmp_path / "lora")
        assert disha_command(["convert", new_tokens.adapter(), lora, "--to", "lora"]) == 0
        notes = disha.inspect_adapter(new_tokens.adapter()).metadata
        base, tokenizer = load_base(str(new_tokens.base), notes=notes)
        converted = peft.PeftModel.from_pretrained(base, lora)
        merged, _ = load_base(str(new_tokens.result.folder / "merged"))
        ids = tokenizer("say two 3<think>", return_tensors="pt")["input_ids"]
        torch.testing.assert_close(converted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)

    def test_a_run_resumes_with_them(self, new_tokens, finetune, tmp_path):
        checkpoint = new_tokens.result.folder / "checkpoint-30"
        flags = [*new_tokens.flags, "--resume_from_checkpoint", checkpoint]
        again = finetune(tmp_path, *flags, base=new_tokens.base)
        assert_same(again.blocks(), new_tokens.result.blocks())

    def test_others_can_not_be_added(self, new_tokens, finetune, tmp_path):
        words = ["--adapter", new_tokens.adapter(), "--new_tokens", "<end>"]
        with pytest.raises(ArgumentError, match=r"new_tokens=.*can't change"):
            finetune(tmp_path, *words, base=new_tokens.base)


def test_tokens_that_a_base_has_train_from_where_they_are(tiny):
    """Such as those that it has in reserve; spare rows of its table are used before it grows."""
    model, tokenizer = load_base(str(tiny))
    known, rows = len(tokenizer), model.lm_head.weight
    model.resize_token_embeddings(known + 2)
    notes = {"new_tokens": '["<|im_start|>", "<think>"]'}
    more, words = load_base(str(tiny), notes=notes)
    assert words.convert_tokens_to_ids(["<|im_start|>", "<think>"]) == [3, known]
    assert torch.equal(more.lm_head.weight[:known], rows[:known])
    torch.testing.assert_close(more.lm_head.weight[known], rows[:known].mean(0))
