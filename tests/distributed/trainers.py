"""Every trainer with every engine on two ranks: as one process, without the base in checkpoints.

Each pair of a trainer and an engine trains four steps, with a checkpoint at each second one, from
which another run goes on. The measure of the best is such that the first checkpoint is the best.
"""

import importlib.util
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from pytorch_lightning import LightningModule
from pytorch_lightning import Trainer as LightningTrainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

import disha
from disha.integrations.accelerate import keep_adapter_only
from disha.integrations.lightning import AdapterCheckpoints as AdapterCheckpoints_of_lightning
from disha.integrations.transformers import AdapterCheckpoints
from disha.sharding.tensors import local_part
from tests.distributed.deepspeed_zero import config
from tests.distributed.harness import assert_same, own_part, whole
from tests.finetune.tiny_models import tokenizer
from tests.processes import RANKS

STEPS = 4
SIZES = {
    "vocab_size": 800,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", **LAYERS}},
    "fsdp2_shards": {
        "fsdp": True,
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT", **LAYERS},
    },
    "zero2": {"deepspeed": config(2)},
    "zero3": {"deepspeed": config(3, {"stage3_gather_16bit_weights_on_model_save": True})},
}
"""An engine -> the settings of `TrainingArguments`."""
if importlib.util.find_spec("deepspeed") is None:  # not each platform has it
    ENGINES = {name: value for name, value in ENGINES.items() if "zero" not in name}


@contextmanager
def accelerate_with(engine):
    """Begin without a state of accelerate, which shards on GPUs only: say that there are some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("ACCELERATE_", "FSDP_")):
                patch.delenv(name)
        if engine != "ddp":
            kind = ("gloo", DistributedType.MULTI_GPU)
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
            patch.setattr(PartialState, "_prepare_backend", lambda *given: kind)
        if "zero" in engine:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
        yield
    unset_hf_deepspeed_config()


def rows():
    return torch.randint(3, 7, (32, 8), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    return disha.inject_adapters(model, "proj", r=2, also_train_rows={"embed": [6, 799]})


def adamw(model):
    return torch.optim.AdamW(disha.adapter_parameters(model), lr=1e-2, weight_decay=0.0)


@cache
def in_one_process():
    """Return the losses and the adapter of a plain loop with the batches of all ranks."""
    model = llama()
    optimizer, losses = adamw(model), []
    for batch in rows().split(2 * RANKS)[:STEPS]:
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapter_of(model)


def adapter_of(model):
    return [whole(value).clone() for value in disha.adapter_state_dict(model).values()]


@dataclass
class Run:
    """The loss of each step, the adapter after it, and how the best is loaded."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    adapters: list[list[torch.Tensor]] = field(default_factory=list)

    def note(self, loss):
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        self.losses.append(mean.item() / RANKS)
        self.adapters.append(adapter_of(self.model))


class Notes(TrainerCallback):
    """Notes the adapter after each step; the loss of a step is in the log."""

    def __init__(self, run):
        self.run = run

    def on_step_end(self, args, state, control, model, **given):
        self.run.adapters.append(adapter_of(model))

    def on_log(self, args, state, control, logs, **given):
        self.run.losses += [logs["loss"]] if "loss" in logs else []


def with_transformers(engine, folder, resume=None, kinds=(Trainer, TrainingArguments), **options):
    trainer, arguments = kinds
    settings = arguments(
        str(folder),
        use_cpu=True,
        max_steps=STEPS,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        **ENGINES[engine],
        **options,
    )
    words = tokenizer()
    words.pad_token = words.eos_token
    data = Dataset.from_dict({"input_ids": rows().tolist(), "labels": rows().tolist()})
    model = llama()
    run = Run(model)
    made = trainer(
        model,
        settings,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=words,
        callbacks=[AdapterCheckpoints(model), Notes(run)],
    )
    made.train(resume_from_checkpoint=resume and str(resume))
    made.save_model(str(folder / "saved"))
    # Trainer notes the best when it saves, but of FSDP's shards only once there is a folder.
    assert resume or made.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = llama()
    disha.load_adapter(loaded, folder / f"checkpoint-{STEPS}" / "adapter.safetensors", replace=True)
    assert_same(adapter_of(loaded), run.adapters[-1])
    return run


def with_accelerate(engine, folder, resume=None):
    given = ENGINES[engine]
    plugins = {}
    if "fsdp" in given:
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type=given["fsdp_config"]["state_dict_type"],
        )
    if "deepspeed" in given:
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=given["deepspeed"])
    accelerator = Accelerator(cpu="zero" not in engine, **plugins)
    run = Run(llama())
    optimizer = adamw(run.model)
    keep_adapter_only(accelerator, run.model)
    model, optimizer = accelerator.prepare(run.model, optimizer)
    start = 2 if resume else 0
    if resume:
        accelerator.load_state(resume)
    for step, batch in enumerate(rows().split(2 * RANKS)[start:STEPS], start + 1):
        batch = own_part(batch)
        loss = model(batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.note(loss)
        if step % 2 == 0:
            accelerator.save_state(folder / f"checkpoint-{step}")
    accelerator.load_state(resume or folder / "checkpoint-2")
    return run


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.run = Run(llama())
        self.model = self.run.model

    def configure_model(self):
        is_first = not isinstance(self.model, FSDPModule)
        if is_first and isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (*self.model.model.layers, self.model):
                fully_shard(part)

    def loss_of(self, batch):
        batch = own_part(batch)
        return self.model(batch, labels=batch).loss

    def training_step(self, batch):
        # A resumed run of Lightning draws from the first row on.
        self.loss = self.loss_of(rows().split(2 * RANKS)[self.global_step])
        return self.loss

    def on_train_batch_end(self, *given):
        self.run.note(self.loss)

    def validation_step(self, batch):
        self.log("loss", self.loss_of(batch), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        return adamw(self.model)

    def train_dataloader(self):
        return DataLoader(rows()[: 2 * RANKS * STEPS], batch_size=2 * RANKS)

    val_dataloader = test_dataloader = train_dataloader


def with_lightning(engine, folder, resume=None):
    strategy = "ddp"
    if "fsdp2" in engine:
        shards = engine == "fsdp2_shards"
        strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=shards)
    keeps = ModelCheckpoint(
        folder,
        "checkpoint-{step}",
        "loss",
        mode="max",
        save_top_k=-1,
        every_n_train_steps=2,
        auto_insert_metric_name=False,
    )
    keeps.FILE_EXTENSION = ""
    trainer = LightningTrainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_steps=STEPS,
        val_check_interval=2,
        callbacks=[AdapterCheckpoints_of_lightning(), keeps],
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, ckpt_path=resume)
    trainer.test(module, ckpt_path="best", verbose=False)
    return module.run


TRAINERS = {
    "trainer": with_transformers,
    "sft": partial(with_transformers, kinds=(SFTTrainer, SFTConfig), bf16=False),
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}


def bytes_of(model):
    """Return the bytes of the parameters that this rank holds."""
    parts = (local_part(getattr(one, "ds_tensor", one)) for one in model.parameters())
    return sum(part.nbytes for part in parts)


def run_all(train, engine, folder):
    """Check a pair of a trainer and an engine."""
    with accelerate_with(engine):
        whole = train(engine, folder / "whole")
    expected, adapter = in_one_process()
    assert whole.losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(whole.adapters[-1], adapter, rtol=1e-2, atol=1e-4)
    base = sum(parameter.nbytes for parameter in llama().parameters())
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    sizes = [path.stat().st_size for path in (checkpoint, *checkpoint.rglob("*"))]
    assert 0 < sum(sizes) < base / 2
    assert_same(adapter_of(whole.model), whole.adapters[1])  # the best is loaded
    block = disha.adapter_parameters(whole.model)[0]
    assert isinstance(block, DTensor) == ("fsdp" in engine)
    assert hasattr(block, "ds_id") == (engine == "zero3")
    assert hasattr(block, "_hp_mapping") == (engine == "zero2")
    there = bytes_of(whole.model)
    print(f"{engine}: a rank holds {there:,} of {base:,} bytes of parameters between two steps")
    assert there < base * (0.55 if "fsdp" in engine or engine == "zero3" else 1.05)
    with accelerate_with(engine):
        rest = train(engine, folder / "rest", folder / "whole" / "checkpoint-2")
    assert_same(rest.adapters[-1], whole.adapters[-1])


for trainer, train in TRAINERS.items():
    for engine in ENGINES:
        if trainer == "lightning" and "zero" in engine:
            continue  # Lightning runs DeepSpeed on CUDA only
        if trainer == "sft" and engine != "fsdp2_shards":
            continue  # `disha finetune` is this trainer, and runs with the others
        vars()[f"check_{trainer}_{engine}"] = partial(run_all, train, engine)
