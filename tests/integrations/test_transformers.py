"""`Trainer` of transformers on adapted models: what it saves, loads and resumes."""

import copy
import json
from functools import partial
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
    TrainerState,
    TrainingArguments,
)

import disha
from disha.integrations.transformers import AdapterCheckpoints
from tests import language_models
from tests.conftest import logged_by, pickled, refused
from tests.integrations.models import FILES, assert_same

WIDTHS = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 64)

SIZES = {**language_models.SIZES, **WIDTHS, "num_attention_heads": 2}


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


@pytest.mark.parametrize("make", [llama, tied, mixtral])
def test_checkpoints_hold_the_adapter_and_resume_bit_for_bit(make, tmp_path):
    whole, part, rest = (adapted(make) for _ in range(3))
    trained(whole, tmp_path / "whole", 4)
    trained(part, tmp_path / "part", 2)
    with logged_by("transformers") as messages:
        trained(rest, tmp_path / "part", 4, resume=True)
    assert not any("missing keys" in message for message in messages)
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


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"method": "bat"}, r"missing: .*bat_block"),
        ({"r": 8}, r"has the shape \(4, 64\), must be \(8, 64\)"),
        ({"target_regex": "q_proj"}, r"unexpected: .*k_proj"),
        ({"also_train": ()}, r"unexpected: .*norm"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(changed, says, tmp_path):
    """Trainer would go on from a new adapter, and only log that keys are missing."""
    trained(adapted(llama), tmp_path, 2)
    settings = {"target_regex": "proj|embed", "r": 4, "also_train": "norm", **changed}
    other = disha.inject_adapters(llama(), **settings)
    with pytest.raises(disha.AdapterStateError, match=says):
        trained(other, tmp_path, 4, resume=tmp_path / "checkpoint-2")


def test_a_model_without_its_adapter_is_saved_and_trains_anew(tmp_path):
    model = adapted(llama)
    trained(model, tmp_path / "run", 2)
    logits = model(rows()[0]["input_ids"][None]).logits
    disha.merge_adapters(model, unload=True)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(rows()[0]["input_ids"][None]).logits, logits)

    disha.inject_adapters(model, "q_proj", r=4, adapter="next")
    keep = partial(AdapterCheckpoints, adapter="next")
    trained(model, tmp_path / "next", 2, keep=keep)
    trained(model, tmp_path / "next", 4, keep=keep, resume=tmp_path / "next" / "checkpoint-2")


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
