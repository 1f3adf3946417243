"""Lightning with adapted models: the checkpoints that it saves and loads."""

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning import Trainer as LightningTrainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import disha
from disha.integrations import lightning
from tests.integrations.models import BASES, assert_same, net


class Module(LightningModule):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.net, self.head = net(linear, steps=torch.tensor(0)), nn.Linear(4, 4)
        torch.manual_seed(2)
        self.data = [(torch.randn(16), torch.randn(4)) for _ in range(16)]

    def training_step(self, batch):
        self.net.steps += self.training
        return (self.head(self.net(batch[0])) - batch[1]).square().mean()

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def fitted(module, folder, epochs, resume=None):
    keeps = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="loss", mode="min")
    trainer = LightningTrainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[keeps, lightning.AdapterCheckpoints()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return trainer


@BASES
def test_checkpoints_of_lightning_hold_the_adapter_and_resume_bit_for_bit(tmp_path, linear):
    whole, part, rest = (Module(linear) for _ in range(3))
    trainer = fitted(whole, tmp_path / "whole", 3)
    fitted(part, tmp_path / "part", 2)
    fitted(rest, tmp_path / "rest", 3, resume=tmp_path / "part" / "epoch=1.ckpt")
    assert_same(rest, whole)
    kept = torch.load(tmp_path / "whole" / "epoch=2.ckpt", weights_only=False)["state_dict"]
    others = {"head.weight", "head.bias", "net.steps"}
    assert kept.keys() == {*disha.adapter_state_dict(whole), *others}

    with torch.no_grad():
        for block in disha.adapter_parameters(whole):
            block.zero_()
    [measured] = trainer.test(whole, ckpt_path="best", verbose=False)
    best = float(trainer.checkpoint_callback.best_model_score)
    assert measured["loss"] == pytest.approx(best)


def test_a_checkpoint_of_another_adapter_is_refused_by_lightning(tmp_path):
    smaller = Module()
    disha.remove_adapters(smaller)
    disha.inject_adapters(smaller, "net.0", r=4, also_train="1")
    fitted(smaller, tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.2\.disha"):
        fitted(Module(), tmp_path, 2, resume=tmp_path / "epoch=0.ckpt")


def test_a_module_without_the_adapter_is_refused_by_lightning(tmp_path):
    module = Module()
    disha.remove_adapters(module)
    with pytest.raises(disha.ArgumentError, match="default"):
        fitted(module, tmp_path, 1)
