"""`Trainer` with FSDP2 on two ranks: its checkpoints hold the adapter and not the base."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import disha
from disha.integrations.transformers import AdapterCheckpoints

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def trained(folder, steps, kind, resume=None, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "use_cpu": True,
        "max_steps": steps,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "fsdp": True,
        "fsdp_config": {
            "state_dict_type": kind,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    }
    arguments = TrainingArguments(str(folder), **settings, **options)
    # accelerate shards on GPUs only, so here it is told that it has them.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    model = disha.inject_adapters(
        LlamaForCausalLM(LlamaConfig(**SIZES)), "proj", r=4, also_train="norm"
    )
    tokens = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    kept = AdapterCheckpoints(model)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[kept])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_checkpoints_are_small_and_resume_bit_for_bit(folder):
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        trained(folder / kind / "whole", 4, kind)
        trained(folder / kind / "part", 2, kind)
        trained(folder / kind / "part", 4, kind, resume=True)
        checkpoints = [folder / kind / run / "checkpoint-4" for run in ("whole", "part")]
        first, second = ((one / "adapter.safetensors").read_bytes() for one in checkpoints)
        assert first == second
        torch.manual_seed(0)
        plain = LlamaForCausalLM(LlamaConfig(**SIZES))
        disha.load_adapter(plain, checkpoints[0] / "adapter.safetensors")
        assert all(bool(one.any()) for one in disha.adapter_parameters(plain))
        kept = sum(value.nbytes for value in disha.adapter_state_dict(plain).values())
        for path in checkpoints[0].rglob("*"):
            if "model" in path.relative_to(checkpoints[0]).parts[0] and path.is_file():
                assert path.stat().st_size < kept + 20_000, path


def check_the_best_is_loaded(folder):
    trainer = trained(
        folder,
        4,
        "FULL_STATE_DICT",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,  # the loss rises, so that the last is not the best
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    disha.save_adapter(trainer.model, folder / "best.safetensors")
    expected = (folder / "checkpoint-2" / "adapter.safetensors").read_bytes()
    assert (folder / "best.safetensors").read_bytes() == expected
