"""Bridges to other libraries, each tried with the real library."""

import copy
import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.dataclasses import get_module_class_from_name
from bitsandbytes.nn import LinearNF4
from pytorch_lightning import LightningModule
from pytorch_lightning import Trainer as LightningTrainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerState,
    TrainingArguments,
)

import disha
from disha.integrations import lightning
from disha.integrations.accelerate import keep_adapter_only
from disha.integrations.transformers import AdapterCheckpoints
from tests import language_models
from tests.conftest import pickled, refused

WIDTHS = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 64)
SIZES = {**language_models.SIZES, **WIDTHS, "num_attention_heads": 2}
FILES = {"adapter.safetensors", "model.safetensors.index.json"}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tied():
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def test_an_adapted_embedding_can_not_be_resized():
    model = disha.inject_adapters(llama(), "embed", 4, init="kaiming")
    with refused(model, disha.ArgumentError, "resize it before you inject"):
        model.resize_token_embeddings(70, mean_resizing=False)


@pytest.mark.parametrize("made", [llama, tied])
def test_what_was_resized_trains_and_is_saved(made, tmp_path):
    base, tokens = made(), torch.arange(70).view(2, 35)
    model = disha.inject_adapters(
        copy.deepcopy(base), "q_proj", 4, init="kaiming", also_train="embed|lm_head"
    )
    model.resize_token_embeddings(70, mean_resizing=False)
    trained = {id(one) for one in model.parameters() if one.requires_grad}
    assert {id(one) for one in disha.adapter_parameters(model)} == trained
    with pytest.warns(UserWarning, match="lm_head.weight") if made is llama else nullcontext():
        disha.save_adapter(model, tmp_path)
    base.resize_token_embeddings(70, mean_resizing=False)
    disha.load_adapter(base, tmp_path)
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def adapted(make):
    torch.manual_seed(0)
    return disha.inject_adapters(make(), "proj|embed", r=4, also_train="norm")


def rows():
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (16, 12))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(model, folder, steps, resume=None, callbacks=(), keep=AdapterCheckpoints, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = rows()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[*([] if keep is None else [keep(model)]), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [llama, tied, mixtral])
def test_checkpoints_hold_the_adapter_and_resume_bit_for_bit(make, tmp_path, caplog):
    whole, part, rest = (adapted(make) for _ in range(3))
    trained(whole, tmp_path / "whole", 4)
    trained(part, tmp_path / "part", 2)
    with caplog.at_level(logging.WARNING):
        trained(rest, tmp_path / "part", 4, resume=True)
    assert "missing keys" not in caplog.text
    assert_same(rest, whole)

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    names = {file.name for file in checkpoint.iterdir()}
    assert names >= FILES
    assert not {name for name in names - FILES if "model" in name}
    kept = sum(value.nbytes for value in disha.adapter_state_dict(whole).values())
    files = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert kept < sum(files) < kept + 10_000  # the adapter, once

    torch.manual_seed(0)
    fresh = make()
    disha.load_adapter(fresh, checkpoint / "adapter.safetensors")
    assert_same(fresh, whole)


def test_a_checkpoint_is_no_model(tmp_path):
    """Without the base in it, it must not become a model of random weights."""
    trained(adapted(llama), tmp_path, 2)
    with pytest.raises(ValueError, match=r"load adapter\.safetensors with disha\.load_adapter"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="quant_method"):
        LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")


def test_the_best_is_loaded_at_the_end(tmp_path):
    model = adapted(llama)
    trainer = trained(
        model,
        tmp_path,
        40,
        callbacks=[EarlyStoppingCallback(1)],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls soon, so that the last is not the best
    )
    chosen = Path(trainer.state.best_model_checkpoint)
    assert chosen.name != f"checkpoint-{trainer.state.global_step}"
    best = adapted(llama)
    disha.load_adapter(best, chosen / "adapter.safetensors", replace=True)
    assert_same(model, best)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_the_final_folder_and_copies_of_the_model_hold_the_adapter(tmp_path):
    model = adapted(llama)
    trained(model, tmp_path / "run", 2).save_model(tmp_path / "final")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for block in disha.adapter_parameters(copied):
            block.zero_()
    copied.save_pretrained(tmp_path / "copy")
    pickled(model).save_pretrained(tmp_path / "pickled")
    for name, expected in (("final", model), ("copy", copied), ("pickled", model)):
        assert {file.name for file in (tmp_path / name).iterdir()} >= FILES
        again = adapted(llama)
        disha.load_adapter(again, tmp_path / name / "adapter.safetensors", replace=True)
        assert_same(again, expected)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_a_quantized_model_trains(options, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")

    def quantized():
        settings = BitsAndBytesConfig(**options)
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, device_map="cpu"
        )
        return disha.inject_adapters(model, "all-linear", r=4, dtype=torch.float32)

    model = quantized()
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(tmp_path / "refused", report_to=[]))
    trainer = trained(model, tmp_path / "run", 4)
    assert model.is_quantized
    again = quantized()
    disha.load_adapter(again, tmp_path / "run" / "checkpoint-4", replace=True)
    tokens = rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_tied_parameter_that_trains_is_named_under_both_names(tmp_path):
    """So that `Trainer` misses neither when it loads the checkpoint."""
    model = disha.inject_adapters(tied(), "q_proj", 4, also_train="embed_tokens")
    AdapterCheckpoints(model)
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= index["weight_map"].keys()


def test_a_checkpoint_has_the_notes_that_its_place_asks_for(tmp_path):
    model = disha.inject_adapters(llama(), "q_proj", 4)
    AdapterCheckpoints(model, notes=lambda path: {"folder": path.parent.name})
    model.save_pretrained(tmp_path / "one")
    assert disha.inspect_adapter(tmp_path / "one").metadata["folder"] == "one"


def test_a_plain_model_is_refused():
    with pytest.raises(disha.ArgumentError, match="default"):
        AdapterCheckpoints(llama())


@pytest.mark.parametrize(
    "keep", [AdapterCheckpoints, lambda model: keep_adapter_only(Accelerator(cpu=True), model)]
)
def test_another_adapter_that_trains_is_not_lost(keep):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "all-linear", r=4)
    keep(model)
    disha.inject_adapters(model, "all-linear", r=4, adapter="b")
    with refused(model, disha.ArgumentError, "adapter 'b' trains, and .* hold 'default' alone"):
        keep(model)
    disha.set_active_adapters(model, "default")
    keep(model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["_save_rng_state", "save_to_json"])
def test_a_run_killed_while_it_saves_resumes_from_the_last_complete_checkpoint(
    step, tmp_path, monkeypatch
):
    whole, part, rest = (adapted(llama) for _ in range(3))
    trained(whole, tmp_path / "whole", 6)

    def write_half(self, path):
        if "checkpoint-4" in str(path):
            Path(path).with_name("trainer_state.json").write_text('{"global_step": 4, "lo')
            raise Killed
        return write(self, path)

    owner = Trainer if step == "_save_rng_state" else TrainerState
    write = getattr(owner, step)
    monkeypatch.setattr(owner, step, write_half)
    with pytest.raises(Killed):
        trained(part, tmp_path / "part", 6)
    monkeypatch.undo()
    trained(rest, tmp_path / "part", 6, resume=True)
    assert_same(rest, whole)
    assert (tmp_path / "part" / "incomplete-checkpoint-4" / "adapter.safetensors").exists()
    assert (tmp_path / "part" / "checkpoint-4" / "trainer_state.json").exists()


# --- Accelerate ----------------------------------------------------------------------------------


def net(linear=nn.Linear):
    torch.manual_seed(0)
    model = nn.Sequential(linear(16, 16), nn.LayerNorm(16), linear(16, 4)).to("cpu")
    return disha.inject_adapters(model, "0|2", r=4, also_train="1")


def with_accelerator(model, *, prepare_first):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if not prepare_first:
        keep_adapter_only(accelerator, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if prepare_first:
        keep_adapter_only(accelerator, model)
    return accelerator, prepared, optimizer


def step(model, optimizer, accelerator):
    loss = model(torch.randn(8, 16)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def in_4_bits(inputs, outputs):
    return LinearNF4(inputs, outputs, compute_dtype=torch.float32)  # quantised by `.to()`


BASES = pytest.mark.parametrize("linear", [nn.Linear, in_4_bits])


@BASES
@pytest.mark.parametrize("prepare_first", [False, True])
def test_states_of_accelerate_hold_the_adapter_and_resume_bit_for_bit(
    tmp_path, prepare_first, linear
):
    model = net(linear)
    accelerator, prepared, optimizer = with_accelerator(model, prepare_first=prepare_first)
    for number in range(4):
        if number == 2:
            accelerator.save_state(tmp_path)
        step(prepared, optimizer, accelerator)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter.safetensors"}

    again = net(linear)
    accelerator, prepared, optimizer = with_accelerator(again, prepare_first=prepare_first)
    accelerator.load_state(tmp_path)
    for _ in range(2):
        step(prepared, optimizer, accelerator)
    assert_same(again, model)


def test_accelerate_wraps_the_layers_of_the_user_that_are_called_block():
    class Block(nn.Sequential):
        pass

    model = disha.inject_adapters(nn.Sequential(nn.Embedding(8, 4), Block(nn.Linear(4, 4))), ".", 2)
    assert get_module_class_from_name(model, "Block") is Block


def test_accelerate_saves_other_models_as_before(tmp_path):
    model, head = net(), nn.Linear(4, 2)
    accelerator = Accelerator(cpu=True)
    keep_adapter_only(accelerator, model)
    accelerator.prepare(head, model)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        head.weight.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(head.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(disha.ArgumentError, match="other"):
        keep_adapter_only(accelerator, model, "other")


# --- Lightning -----------------------------------------------------------------------------------


class Module(LightningModule):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.net, self.head = net(linear), nn.Linear(4, 4)
        torch.manual_seed(2)
        self.data = [(torch.randn(16), torch.randn(4)) for _ in range(16)]

    def training_step(self, batch):
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
    assert kept.keys() == {*disha.adapter_state_dict(whole), "head.weight", "head.bias"}

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
    with pytest.raises(disha.AdapterStateError, match=r"lacks 3 tensors .*net\.2\.disha"):
        fitted(Module(), tmp_path, 2, resume=tmp_path / "epoch=0.ckpt")


def test_a_module_without_the_adapter_is_refused_by_lightning(tmp_path):
    module = Module()
    disha.remove_adapters(module)
    with pytest.raises(disha.ArgumentError, match="default"):
        fitted(module, tmp_path, 1)
