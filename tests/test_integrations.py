"""Bridges to other libraries, each tried with the real library."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import disha
from disha.integrations.transformers import AdapterCheckpoints

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FILES = {"adapter.safetensors", "model.safetensors"}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tied():
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def adapted(make):
    torch.manual_seed(0)
    return disha.inject_adapters(make(), "proj|embed", r=4, also_train="norm")


def rows():
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (16, 12))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(model, folder, steps, resume=None, callbacks=(), **options):
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
        callbacks=[AdapterCheckpoints(model), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(model, other):
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


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
    assert (checkpoint / "model.safetensors").stat().st_size < kept + 10_000

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
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "pickled")
    for name, expected in (("final", model), ("copy", copied), ("pickled", model)):
        assert {file.name for file in (tmp_path / name).iterdir()} >= FILES
        again = adapted(llama)
        disha.load_adapter(again, tmp_path / name / "adapter.safetensors", replace=True)
        assert_same(again, expected)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_a_quantised_model_trains(options, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")

    def quantised():
        settings = BitsAndBytesConfig(**options)
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, device_map="cpu"
        )
        return disha.inject_adapters(model, "all-linear", r=4, dtype=torch.float32)

    model = quantised()
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(tmp_path / "refused", report_to=[]))
    trainer = trained(model, tmp_path / "run", 4)
    assert model.is_quantized
    again = quantised()
    disha.load_adapter(
        again, tmp_path / "run" / "checkpoint-4" / "adapter.safetensors", replace=True
    )
    tokens = rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_plain_model_is_refused():
    with pytest.raises(disha.ArgumentError, match="default"):
        AdapterCheckpoints(llama())
