"""Bases in few bits on two ranks: what trains as in one process, and what their libraries lack."""

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from bitsandbytes.nn import Linear8bitLt
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
from transformers import Trainer, TrainingArguments

import disha
from disha.finetune.base import load_base
from disha.integrations.transformers import AdapterCheckpoints
from disha.interop import lora
from tests.distributed.harness import own_part
from tests.finetune.tiny_models import write_model
from tests.four_bits import quantize
from tests.processes import RANKS
from tests.reference import METHODS
from tests.whole.test_experts import build, tokens

PROJECTIONS = r"self_attn\.._proj$"


def four_bits(storage=torch.bfloat16):
    return quantize(build("Mixtral", "grouped_mm", width=64, inner=32), storage)


def other(kind):
    """Return a base whose attention is in 8 bits of bitsandbytes, or in tensors of torchao."""
    model = build("Mixtral", "grouped_mm", width=64, inner=32)
    for name, module in list(model.named_modules()):
        if not (isinstance(module, nn.Linear) and name.endswith("_proj")):
            continue
        if kind == "8 bits":
            sizes = module.in_features, module.out_features, module.bias is not None
            layer = Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to("cpu"))  # quantises
        elif kind == "nf4":
            module.weight = nn.Parameter(to_nf4(module.weight.data, 64, 4), requires_grad=False)
        else:
            quantize_(module, Int8WeightOnlyConfig())
    return model


def sharded(model, layers=None):
    for layer in layers or model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def losses(model, rows):
    """Train three steps; return the losses on the rows of all ranks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=0.01), []
    for _ in range(3):
        loss = model.train()(rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / RANKS)
    return found


def alike(found, expected):
    """Whether losses are the same up to the order of sums in float32."""
    return found == pytest.approx(expected, rel=1e-5)


def outputs(model):
    with torch.no_grad():
        return model.eval()(tokens(), use_cache=False).logits


def adapted(base, method="bone"):
    return disha.inject_adapters(base, "all-linear", r=4, method=method)


def check_four_bits_and_experts(folder):
    for storage, method in ((torch.bfloat16, "bone"), (torch.uint8, "bat")):
        plain, model = (adapted(four_bits(storage), method) for _ in range(2))
        outputs(model)  # on some CPUs, this would repack weights without adapters
        layer = sharded(model).model.layers[0]
        packed = layer.self_attn.q_proj._parameters["weight"]
        stack = layer.mlp.experts.parametrizations["gate_up_proj"]._parameters["original"]
        assert isinstance(packed, DTensor)
        assert isinstance(stack, DTensor)
        own = folder / f"plain{dist.get_rank()}"
        disha.save_adapter(plain, own)
        disha.save_adapter(model, folder / "before")
        assert (folder / "before").read_bytes() == own.read_bytes()
        assert alike(losses(model, own_part(tokens())), losses(plain, tokens()))
        disha.save_adapter(model, folder / "after")
        loaded = four_bits(storage)
        disha.load_adapter(loaded, folder / "after")
        torch.testing.assert_close(outputs(model), outputs(loaded), rtol=1e-5, atol=1e-6)
        disha.load_adapter(model, folder / "before", replace=True)
        assert not any(one.full_tensor().any() for one in disha.adapter_parameters(model))


def check_losses_of_peft(folder):
    """PEFT's LoRA with a fixed A is Bone."""
    ours = disha.inject_adapters(four_bits(), PROJECTIONS, r=4)
    path = folder / f"lora{dist.get_rank()}"
    lora.export(ours, path)
    theirs = peft.PeftModel.from_pretrained(four_bits(), path, is_trainable=True)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    sharded(theirs, theirs.base_model.model.model.layers)
    rows = own_part(tokens())
    assert alike(losses(sharded(ours), rows), losses(theirs, rows))


def check_other_libraries(folder):
    """Where a base can't be sharded, its library fails without an adapter too."""
    rows = own_part(tokens())
    for method in METHODS:
        expected = losses(adapted(other("nf4"), method), tokens())
        assert alike(losses(sharded(adapted(other("nf4"), method)), rows), expected)
    with pytest.raises(NotImplementedError, match="Int8Tensor"):
        sharded(other("int8"))
    with pytest.raises(AttributeError, match="'Parameter' object has no attribute 'CB'"):
        outputs(sharded(other("8 bits").requires_grad_(False)))
    for kind in ("8 bits", "nf4", "int8"):
        model = DistributedDataParallel(adapted(other(kind)), init_sync=False)
        assert alike(losses(model, rows), losses(adapted(other(kind)), tokens()))


def check_trainer(folder):
    """With `--bits 4`, accelerate shards all weights, and a run resumes."""
    if dist.get_rank() == 0:
        write_model(folder / "model", "Mixtral")
    dist.barrier()
    rows = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trained(name, steps, fsdp, resume=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        layers = {"transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]}
        arguments = TrainingArguments(
            str(folder / name),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            **({"fsdp": True, "fsdp_config": layers} if fsdp else {}),
        )
        if fsdp:  # accelerate shards on GPUs only, so it is told that it has them
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        model, _ = load_base(str(folder / "model"), "4", torch.device("cpu"))
        kept = [AdapterCheckpoints(disha.inject_adapters(model, "proj", r=4))]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=kept)
        trainer.train(resume_from_checkpoint=resume)
        assert fsdp == all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found = trained("whole", 4, True)
    assert found == pytest.approx(trained("replicated", 4, False), rel=1e-4)
    trained("part", 2, True)
    assert trained("part", 4, True, resume=True) == found
