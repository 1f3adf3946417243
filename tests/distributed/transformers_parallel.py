"""Tensor and expert parallelism of `transformers` on two ranks: it equals one process."""

import warnings

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import disha
from tests.conftest import perturb
from tests.distributed.harness import gradients_of
from tests.language_models import llama, mixtral
from tests.processes import RANKS


def base(folder, model):
    """Return the folder of a model that rank 0 has saved."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "base")
    dist.barrier()
    return folder / "base"


def assert_equals_one_process(folder, parallel, r, method):
    """Train and infer: in inference, `transformers` computes with local tensors."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for model in (parallel, plain):
        perturb(disha.inject_adapters(model, "all-linear", r, method=method))
    tokens = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(parallel(tokens).logits, plain(tokens).logits)
    for model in (parallel, plain):
        model(tokens, labels=tokens).loss.backward()
    found, expected = gradients_of(parallel), gradients_of(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return plain, tokens


def check_tensor_parallel(folder):
    path = base(folder, llama(tie_word_embeddings=True))
    for r, method in ((3, "bone"), (4, "bat"), (3, "lora"), (2, "bone_groups2")):
        config = DistributedConfig(tp_plan="auto")
        parallel = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
        plain, tokens = assert_equals_one_process(path, parallel, r, method)
        outputs = []
        for model in (parallel, plain):
            with torch.no_grad(), disha.route_adapters(model, ["default", None]):
                outputs.append(model(tokens).logits)
        torch.testing.assert_close(*outputs)


def check_expert_parallel(folder):
    path = base(folder, mixtral())
    for r, method in ((3, "bone"), (4, "bat"), (3, "lora"), (2, "bone_groups2")):
        config = DistributedConfig(tp_size=RANKS, ep_size=RANKS)
        parallel = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
        assert_equals_one_process(path, parallel, r, method)


def check_packed_experts_are_refused(folder):
    """Packed as columns, each rank holds a part of gate and one of up."""
    path = base(folder, mixtral())
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"}
    config = DistributedConfig(tp_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    with pytest.raises(disha.TargetError, match="placed as Shard or Replicate"):
        disha.inject_adapters(model, "gate_up_proj", 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disha.inject_adapters(model, "all-linear", 4)
    assert any(
        "experts.gate_up_proj: its weight is a DTensor" in str(one.message) for one in caught
    )
