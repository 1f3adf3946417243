"""Two processes against one, for both strategies. Run by `test_parallel.py` under torchrun."""

from __future__ import annotations

import errno
import itertools
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

import disha
from disha.finetune.data.batches import collate
from disha.finetune.errors import OutputError, SettingsError, TrainingError
from disha.finetune.stopping import Interrupted, listening, raising
from disha.finetune.training import checkpoints
from disha.finetune.training.checkpoints import Checkpoints
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.layers import enable_gradient_checkpointing
from disha.finetune.training.loop import make_optimizer, training_steps
from disha.finetune.training.objectives import TensorObjective
from disha.finetune.training.parallel import (
    Processes,
    distribute,
    gathered,
    is_sharded,
    undistributed,
)
from tests.distributed.harness import main
from tests.finetune.training.tiny import objective, plan, source

STRATEGIES = ("ddp", "fsdp")
ALONE = Processes.alone(torch.device("cpu"))
SETUP = {"seed": 0}


def together():
    return Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def one_plan(**changes):
    return plan(gradient_accumulation_steps=4, learning_rate=1e-3, **changes)


def two_plan(**changes):
    return plan(gradient_accumulation_steps=2, learning_rate=1e-3, **changes)


def gathered_blocks(trained):
    return [gathered(block).detach().clone() for block in disha.adapter_parameters(trained)]


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def assert_same_curve(strategy, folder, rows, *, prepare=lambda model: None, **options):
    """Losses, tokens, norms and the saved adapter are those of one process."""
    alone = objective(**options)
    expected = list(
        training_steps(alone, source(rows), one_plan(num_train_epochs=3), processes=ALONE)
    )
    inner = objective(**options)
    prepare(inner.model)
    shared = distribute(inner, strategy, together())
    assert is_sharded(shared) == (strategy == "fsdp")
    steps = list(
        training_steps(shared, source(rows), two_plan(num_train_epochs=3), processes=together())
    )
    assert [s.progress.step for s in steps] == [s.progress.step for s in expected]
    assert [(s.epoch, s.batches, s.tokens) for s in steps] == [
        (s.epoch, s.batches, s.tokens) for s in expected
    ]
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-5)
    assert [s.gradient_norm for s in steps] == pytest.approx(
        [s.gradient_norm for s in expected], rel=1e-4
    )
    assert_close(gathered_blocks(undistributed(shared).model), gathered_blocks(alone.model))
    path = folder / f"{strategy}{rows}"
    disha.save_adapter(undistributed(shared).model, path)
    dist.barrier()
    plain = objective(**options)
    disha.load_adapter(plain.model, path, replace=True)
    assert_close(gathered_blocks(plain.model), gathered_blocks(alone.model))


def check_the_curve_is_that_of_one_process(folder):
    for strategy, rows in itertools.product(STRATEGIES, (16, 13, 9)):
        # 8, 7 and 5 batches: the last step is whole, lacks one batch, has a single one
        assert_same_curve(strategy, folder, rows)


def check_bat_and_a_frozen_base_in_bf16(folder):
    for strategy in STRATEGIES:
        assert_same_curve(strategy, folder, 9, dtype=torch.bfloat16)
    assert_same_curve("fsdp", folder, 13, method="bat")


def check_an_adapted_head(folder):
    for strategy in STRATEGIES:
        assert_same_curve(strategy, folder, 9, target="lm_head|q_proj$")


def check_gradient_checkpointing(folder):
    for strategy in STRATEGIES:
        assert_same_curve(strategy, folder, 9, prepare=enable_gradient_checkpointing)


def check_trained_parameters_become_those_of_rank_0(folder):
    for strategy in STRATEGIES:
        first, other = objective(), objective()
        with torch.no_grad():
            for block in disha.adapter_parameters(other.model):
                block += together().rank
        shared = distribute(other, strategy, together())
        assert_close(gathered_blocks(shared), gathered_blocks(first))


class Images(nn.Module):
    """No list of layers, a normalisation that keeps statistics, and a part that is not used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.spare = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).mean(dim=(2, 3)))


class Pictures:
    """Nine labelled pictures, three a batch."""

    def batches(self, epoch):
        for start in range(0, 9, 3):
            yield [(epoch, index) for index in range(start, start + 3)]

    def batches_per_epoch(self):
        return 3

    def weight(self, batch):
        return len(batch)

    def collate(self, batch):
        generator = torch.Generator().manual_seed(batch[0][1])
        return Labelled(
            torch.randn(len(batch), 1, 6, 6, generator=generator),
            torch.tensor([index % 3 for _, index in batch]),
        )


class Labelled:
    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.classes = inputs, targets, 3
        self.size = self.weight = len(targets)

    def to(self, device):
        return self


def pictures_objective():
    torch.manual_seed(0)
    return TensorObjective(disha.inject_adapters(Images(), "conv|head|spare", 1))


def check_a_model_of_tensors(folder):
    alone = pictures_objective()
    options = {"max_steps": 6, "learning_rate": 1e-3}
    expected = [
        step.loss
        for step in training_steps(
            alone, Pictures(), plan(gradient_accumulation_steps=2, **options)
        )
    ]
    for strategy in STRATEGIES:
        shared = distribute(pictures_objective(), strategy, together())
        steps = training_steps(
            shared, Pictures(), plan(gradient_accumulation_steps=1, **options), processes=together()
        )
        assert [step.loss for step in steps] == pytest.approx(expected, rel=1e-5)


def check_evaluation(folder):
    rows = source(26)
    batches = [rows.collate(batch) for batch in rows.batches(1)]
    assert len(batches) % 2 == 1
    expected = mean_loss(objective(), batches)
    for strategy in STRATEGIES:
        shared = distribute(objective(dropout=0.5), strategy, together())
        found = mean_loss(shared, batches, processes=together())
        assert found.terms == expected.terms
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        next(training_steps(shared, rows, two_plan(), processes=together()))  # it still trains


def trained(shared, checkpoint, saved=None, choices=None, processes=None):
    """Train six steps, or from `saved` on; save after the third."""
    choices, processes = choices or two_plan(max_steps=6), processes or together()
    optimizer = make_optimizer(shared, choices)
    torch.manual_seed(100 + processes.rank)
    if saved is not None:
        checkpoint.restore(saved, shared, optimizer)
    losses = []
    for step in training_steps(
        shared,
        source(13),
        choices,
        optimizer=optimizer,
        processes=processes,
        start=None if saved is None else saved.progress,
    ):
        losses.append(step.loss)
        if step.step == 3:
            history = {"losses": losses}
            checkpoint.save(shared, optimizer, step.progress, setup=SETUP, history=history)
    return losses


def check_resuming_is_exact(folder):
    for strategy in STRATEGIES:
        checkpoint = Checkpoints(folder / strategy, None, together())
        straight = distribute(objective(dropout=0.2), strategy, together())
        expected = trained(straight, checkpoint)
        resumed = distribute(objective(dropout=0.2, seed=0), strategy, together())
        saved = checkpoint.newest_good(pytest.fail)
        assert saved.progress.step == 3
        assert saved.history["losses"] + trained(resumed, checkpoint, saved) == expected
        assert all(map(torch.equal, gathered_blocks(resumed), gathered_blocks(straight)))
        assert not list((folder / strategy).glob(".*"))


def check_a_checkpoint_goes_on_under_the_other_strategy(folder):
    for strategy, other in (STRATEGIES, STRATEGIES[::-1]):
        checkpoint = Checkpoints(folder / strategy, None, together())
        straight = distribute(objective(), strategy, together())
        expected = trained(straight, checkpoint)
        resumed = distribute(objective(), other, together())
        found = trained(resumed, checkpoint, checkpoint.newest_good(pytest.fail))
        assert found == pytest.approx(expected[3:], rel=1e-5)


def check_one_process_goes_on_where_two_were(folder):
    for strategy in STRATEGIES:
        straight = distribute(objective(), strategy, together())
        expected = trained(straight, Checkpoints(folder / strategy, None, together()))
        alone = Checkpoints(folder / strategy, None, ALONE)
        resumed, saved = objective(), alone.newest_good(pytest.fail)
        found = trained(resumed, alone, saved, one_plan(max_steps=6), ALONE)
        assert found == pytest.approx(expected[3:], rel=1e-5)
        assert_close(gathered_blocks(resumed), gathered_blocks(straight))


def check_two_processes_go_on_where_one_was(folder):
    folder = folder / str(together().rank)  # each trains by itself first
    straight, alone = objective(), Checkpoints(folder, None, ALONE)
    expected = trained(straight, alone, None, one_plan(max_steps=6), ALONE)
    for strategy in STRATEGIES:
        checkpoint = Checkpoints(folder, None, together())
        resumed = distribute(objective(), strategy, together())
        found = trained(resumed, checkpoint, checkpoint.newest_good(pytest.fail))
        assert found == pytest.approx(expected[3:], rel=1e-5)
        assert_close(gathered_blocks(resumed), gathered_blocks(straight))


def check_a_full_disk_is_told_to_both(folder):
    def full(*written):
        raise OSError(errno.ENOSPC, "No space left on device")

    for strategy in STRATEGIES:
        checkpoint = Checkpoints(folder / strategy, None, together())
        shared = distribute(objective(), strategy, together())
        with pytest.MonkeyPatch.context() as patch:
            if together().is_main:
                patch.setattr(checkpoints, "_complete", full)
            with pytest.raises(OutputError, match="No space left on device; make room"):
                trained(shared, checkpoint)
        assert list((folder / strategy).iterdir()) == []
        dist.barrier()


def check_a_loss_that_is_not_finite_on_one_process_stops_both(folder):
    inner = objective()
    if together().rank == 1:
        with torch.no_grad():
            inner.model.model.norm.weight[0] = float("nan")
    before = gathered_blocks(inner)
    shared = distribute(inner, "ddp", together())
    with pytest.raises(TrainingError, match="stopped at step 1: loss nan"):
        list(training_steps(shared, source(), two_plan(), processes=together()))
    assert all(map(torch.equal, gathered_blocks(inner), before))


def check_a_signal_to_one_process_stops_both_before_the_same_batch(folder):
    choices = two_plan()
    for strategy in STRATEGIES:
        batches = itertools.count(1)

        class Signalling(type(source())):
            def collate(self, batch, batches=batches):
                if next(batches) == 3 and together().rank == 1:  # the first of two in step 2
                    signal.raise_signal(signal.SIGTERM)
                return super().collate(batch)

        shared = distribute(objective(), strategy, together())
        optimizer, done = make_optimizer(shared, choices), []
        with listening(), raising(False), pytest.raises(Interrupted) as raised:
            done.extend(
                step.progress
                for step in training_steps(
                    shared,
                    Signalling(source(16).examples, 2, 0),
                    choices,
                    optimizer=optimizer,
                    processes=together(),
                )
            )
        assert raised.value.number == signal.SIGTERM
        assert next(batches) == 4
        [progress] = done
        checkpoint = Checkpoints(folder / strategy, None, together())
        checkpoint.save(shared, optimizer, progress, setup=SETUP, history={})
        assert checkpoint.newest_good(pytest.fail).progress.step == 1


def check_differing_models_are_refused(folder):
    inner = objective(method="bone" if together().rank == 0 else "bat")
    with pytest.raises(TrainingError, match="different parameters to train"):
        distribute(inner, "ddp", together())


def check_trained_parameters_of_two_types_are_refused_by_fsdp(folder):
    inner = objective(dtype=torch.bfloat16)
    inner.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"are bfloat16 and float32.*use --bits fp32"):
        distribute(inner, "fsdp", together())


def check_each_process_collates_its_own_batches_only(folder):
    collated = []

    class Counted(type(source())):
        def collate(self, batch):
            collated.append(self.weight(batch))
            return collate(batch)

    rows = Counted(source(16).examples, 2, 0)
    shared = distribute(objective(), "ddp", together())
    list(training_steps(shared, rows, two_plan(), processes=together()))
    weights = [rows.weight(batch) for batch in rows.batches(1)]
    assert collated == weights[together().rank :: 2]


if __name__ == "__main__":
    main(globals())
