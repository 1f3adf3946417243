import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from disha import AdapterFileWarning, ArgumentError
from disha.finetune import main
from disha.finetune.arguments import TrainingArguments
from disha.finetune.resuming import choose_checkpoint, warn_of_lost_state
from tests.conftest import assert_same
from tests.finetune.conftest import EXACT, Result
from tests.finetune.tiny_models import write_model


@pytest.fixture(scope="module")
def uninterrupted(finetune, tmp_path_factory):
    return finetune(tmp_path_factory.mktemp("uninterrupted"), *EXACT)


def killed_in_step_6(words):
    """Run the command, and kill this process, which is a fork of the tests'."""
    step = SFTTrainer.training_step

    def killing(trainer, *given, **named):
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *given, **named)

    SFTTrainer.training_step = killing
    main(words)


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOutputFolder:
    def test_a_finished_run_is_kept(self, finetune, uninterrupted):
        before = uninterrupted.adapter.read_bytes()
        with pytest.raises(ArgumentError, match=r"holds adapter\.safetensors of an earlier run"):
            finetune(uninterrupted.folder)
        assert uninterrupted.adapter.read_bytes() == before

    def test_a_dry_run_is_refused_where_the_run_would_be(self, finetune, uninterrupted):
        before = files_in(uninterrupted.folder)
        with pytest.raises(ArgumentError, match=r"holds adapter\.safetensors of an earlier run"):
            finetune(uninterrupted.folder, "--dry_run")
        with pytest.raises(ArgumentError, match="--r was 8, and is 4"):
            finetune(uninterrupted.folder, *EXACT, "--r", 4, "--resume", "--dry_run")
        finetune(uninterrupted.folder, *EXACT, "--resume", "--dry_run")
        assert files_in(uninterrupted.folder) == before

    @pytest.mark.parametrize("name", ["adapter.safetensors", "merged"])
    def test_resuming_without_a_checkpoint_keeps_it(self, name, finetune, uninterrupted, tmp_path):
        shutil.copy(uninterrupted.adapter, tmp_path / name)
        with pytest.raises(ArgumentError, match="of an earlier run; go on from a complete"):
            finetune(tmp_path, "--resume")
        assert (tmp_path / name).read_bytes() == uninterrupted.adapter.read_bytes()

    def test_going_on_from_a_checkpoint_elsewhere_keeps_it(self, finetune, uninterrupted, tmp_path):
        shutil.copy(uninterrupted.adapter, tmp_path)
        elsewhere = ["--resume_from_checkpoint", uninterrupted.folder / "checkpoint-6"]
        with pytest.raises(ArgumentError, match=r"holds adapter\.safetensors of an earlier run"):
            finetune(tmp_path, *EXACT, *elsewhere)
        result = finetune(tmp_path, *EXACT, *elsewhere, "--overwrite_output_dir")
        assert_same(result.blocks(), uninterrupted.blocks())

    @pytest.mark.parametrize("what", ["--base", "--adapter", "--resume_from_checkpoint"])
    def test_what_a_run_reads_is_not_deleted(self, what, finetune, uninterrupted, tiny, tmp_path):
        """Also if a link from elsewhere leads to it."""
        folder = shutil.copytree(uninterrupted.folder, tmp_path / "run")
        shutil.copytree(tiny, folder / "merged")
        names = {"--base": "merged", "--adapter": "adapter.safetensors"}
        (tmp_path / "link").symlink_to(folder / names.get(what, "checkpoint-6"))
        before = files_in(folder)
        with pytest.raises(ArgumentError, match=r"--overwrite_output_dir would delete .*link"):
            finetune(folder, *EXACT, "--overwrite_output_dir", what, tmp_path / "link")
        assert files_in(folder) == before

    def test_going_on_from_a_link_in_it_keeps_it(self, uninterrupted, tmp_path):
        (tmp_path / "checkpoint-6").symlink_to(uninterrupted.folder / "checkpoint-6")
        (tmp_path / "adapter.safetensors").touch()
        training = TrainingArguments(tmp_path, resume_from_checkpoint="True")
        assert choose_checkpoint(training) == str(tmp_path / "checkpoint-6")

    def test_starting_over_removes_it(self, finetune, tmp_path):
        finetune(tmp_path, "--save_steps", 2)
        (tmp_path / "best-checkpoint-keep").mkdir()  # of the user
        assert finetune(tmp_path, "--max_steps", 1, "--overwrite_output_dir").report["steps"] == 1
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
        assert (tmp_path / "best-checkpoint-keep").exists()


class TestResuming:
    def flags(self, tiny, data, folder):
        words = ["--base", tiny, "--data", data, "--r", 8, "--learning_rate", 0.01]
        words += ["--samples", 0, "--output_dir", folder, *EXACT, "--overwrite_output_dir"]
        return [str(word) for word in words]

    def test_a_killed_run_resumes_bit_for_bit(self, tiny, data, tmp_path, uninterrupted):
        words = self.flags(tiny, data, tmp_path)
        fork = multiprocessing.get_context("fork")
        killed = fork.Process(target=killed_in_step_6, args=(words,))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert main([*words, "--resume"]) == 0
        result = Result(tmp_path)
        assert result.report["resumed_from"].endswith("checkpoint-4")
        assert result.report["training_losses"] == uninterrupted.report["training_losses"]
        expected = uninterrupted.blocks()
        for name, block in result.blocks().items():
            assert torch.equal(block, expected[name]), name

    def test_on_another_base_it_is_refused(self, finetune, tmp_path):
        finetune(tmp_path / "run", "--max_steps", 2)
        other = write_model(tmp_path / "other", seed=1)
        with pytest.raises(AdapterFileWarning, match="saved from other base weights"):
            finetune(tmp_path / "run", "--resume", base=other)

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--learning_rate", 0.02], "--learning_rate was 0.01, and is 0.02"),
            (["--weight_decay", 0.1], "--weight_decay was 0.0, and is 0.1"),
            (["--seed", 7, "--per_device_train_batch_size", 2], "--seed was 42, and is 7"),
            (["--data", "more.jsonl"], r"--data was \['.*rows.jsonl'\], and is \['more.jsonl'\]"),
            (["--r", 4], "--r was 8, and is 4"),
        ],
    )
    def test_other_settings_are_refused(self, words, says, uninterrupted, finetune):
        with pytest.raises(ArgumentError, match=says):
            finetune(uninterrupted.folder, *EXACT, *words, "--resume")

    def test_a_run_that_is_complete_trains_no_more(self, finetune, tmp_path):
        """Also if its last step is inside an epoch."""
        words = ["--max_steps", 4, "--lr_scheduler_type", "constant"]
        before = finetune(tmp_path, *words)
        blocks = before.blocks()
        again = finetune(tmp_path, *words, "--resume")
        assert again.report["steps"] == 4
        assert again.report["proof"] == before.report["proof"]
        assert_same(again.blocks(), blocks)

    def test_it_trains_longer_and_with_less_memory(self, finetune, tmp_path):
        constant = ["--lr_scheduler_type", "constant"]
        first = finetune(tmp_path, *constant, "--max_steps", 2).report
        free = ["--max_steps", 4, "--save_steps", 1, "--gradient_checkpointing"]
        free += ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
        free += ["--torch_empty_cache_steps", 9, "--ddp_timeout", 60, "--project", "tests"]
        free += ["--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end"]
        longer = finetune(tmp_path, *constant, *free, "--resume")
        assert longer.report["steps"] == 4
        assert longer.losses[0] == first["losses"]["0"]

    def test_it_goes_on_counting_measurements_without_a_lower_loss(self, finetune, tmp_path):
        words = ["--learning_rate", 0, "--early_stopping_patience", 3]
        words += ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1]
        expected = finetune(tmp_path / "whole", *words, "--max_steps", 8).report["steps"]
        finetune(tmp_path / "parts", *words, "--max_steps", 2)
        found = finetune(tmp_path / "parts", *words, "--max_steps", 8, "--resume")
        assert found.report["steps"] == expected < 5  # 5 is where it would stop if it began anew

    def test_the_checkpoint_of_another_trainer_is_refused(self, finetune, uninterrupted, tmp_path):
        checkpoint = shutil.copytree(uninterrupted.folder / "checkpoint-8", tmp_path / "other")
        state = TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME)
        del state.stateful_callbacks["Course"]
        state.save_to_json(checkpoint / TRAINER_STATE_NAME)
        with pytest.raises(ArgumentError, match="is of another trainer; give its adapter as"):
            finetune(tmp_path / "out", *EXACT, "--resume_from_checkpoint", checkpoint)

    def test_what_shows_an_earlier_adapter_goes(self, finetune, tmp_path):
        finetune(tmp_path, "--max_steps", 2, "--samples", 1)
        shown = [tmp_path / "samples.md", tmp_path / "forgetting.png"]
        assert shown[0].exists()
        shown[1].touch()  # by `disha evaluate --scale`
        finetune(tmp_path, "--max_steps", 4, "--resume")
        assert not any(path.exists() for path in shown)
        assert "samples.md" not in (tmp_path / "README.md").read_text()

    def test_without_a_checkpoint_it_starts_at_the_beginning(self, finetune, tmp_path):
        with pytest.warns(UserWarning, match="starting at the beginning"):
            assert finetune(tmp_path, "--resume").report["resumed_from"] is None


def test_a_checkpoint_without_the_state_of_the_optimizer_is_told(tmp_path):
    training = TrainingArguments(tmp_path)
    with pytest.warns(UserWarning, match=r"no optimizer\.pt and no scheduler\.pt, so these start"):
        warn_of_lost_state(str(tmp_path), training)
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / name).touch()
    warn_of_lost_state(str(tmp_path), training)  # a warning would be an error here
