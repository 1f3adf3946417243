"""DeepSpeed ZeRO-2 and ZeRO-3 on two ranks: the same as one process with the whole batch.

DeepSpeed is imported in the checks: the tests are also collected where it can't be installed.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import disha
from disha.model.computed_weights import computed_weights
from disha.model.view import ModelView
from tests import language_models
from tests.distributed.harness import own_part
from tests.four_bits import quantize
from tests.processes import RANKS

STAGES = (2, 3)
llama = partial(language_models.llama, **language_models.SMALLER)
mixtral = partial(language_models.mixtral, **language_models.SMALLER)


def import_for_all_ranks():
    """Import DeepSpeed before the ranks are made, also for those of other scripts."""
    import deepspeed

    _ = deepspeed.ops.__compatible_ops__  # for which it tries a C compiler


def adapted(model, **options):
    torch.manual_seed(2)
    options = {"target_regex": "all-linear", "r": 4, "init": "kaiming", **options}
    return disha.inject_adapters(model, **options)


def config(stage, zero=None, **options):
    """By default, DeepSpeed would not partition tensors as small as these."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            **(zero or {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }


def engine_of(model, settings, lr=0.05):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    parameters = list(disha.adapter_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, optimizer=optimizer, config=settings
    )
    return engine


def batch():
    return torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1))


def logits(model):
    return model(input_ids=batch()).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def trained(model, engine, steps=3, tolerance=1e-5):
    """Train both, the engine with each rank's part of the batch. The losses are the same."""
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model), lr=0.05, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        expected = model(input_ids=batch(), labels=batch()).loss
        expected.backward()
        optimizer.step()
        losses = []
        for part in own_part(batch()).split(engine.train_micro_batch_size_per_gpu()):
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / RANKS, expected.detach(), rtol=tolerance, atol=0)


CASES = {
    "bone": (llama, {}),
    "bat": (llama, {"method": "bat"}),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_regex": "proj|embed|head", "also_train": "norm"},
    ),
    "rows": (
        lambda: llama(tie_word_embeddings=True),
        {"also_train_rows": {"embed_tokens": [3, 30, 31]}},
    ),
    "experts": (mixtral, {}),
    "one expert after the other": (lambda: mixtral(experts_implementation="eager"), {}),
}
"""Name -> the base, and how it is adapted."""


def check_training(folder):
    for stage in (1, *STAGES):
        for make, options in CASES.values():
            engine = engine_of(adapted(make(), **options), config(stage))
            trained(adapted(make(), **options), engine)
            base = engine.module.model.layers[0].self_attn.q_proj.base_weight
            assert base.numel() == (0 if stage == 3 else 16 * 16)


def check_computed_weights(folder):
    for make, options in (*CASES.values(), (lambda: quantize(mixtral()), {"method": "bat"})):
        plain = dict(computed_weights(ModelView(adapted(make(), **options))))
        model = adapted(make(), **options)
        engine_of(model, config(3))
        computed = dict(computed_weights(ModelView(model)))
        assert computed.keys() == plain.keys()
        for name, weight in computed.items():
            close(weight, plain[name])


def check_four_bits(folder):
    """Linear layers and stacks of experts."""
    for stage, method in ((2, "bone"), (3, "bone"), (3, "bat")):
        plain, model = (adapted(quantize(mixtral()), method=method) for _ in range(2))
        engine, path = engine_of(model, config(stage)), folder / f"{stage}{method}"
        trained(plain, engine)
        layer = model.model.layers[0]
        stack = layer.mlp.experts.parametrizations["gate_up_proj"]
        for owner, name in ((layer.self_attn.q_proj, "weight"), (stack, "original")):
            assert bool(owner._parameters[name].numel()) == (stage == 2)
        disha.save_adapter(engine, path)
        loaded = quantize(mixtral())
        disha.load_adapter(loaded, path)
        close(logits(loaded), logits(plain))
        disha.load_adapter(engine, path, replace=True)


def check_recomputation(folder):
    for reentrant in (False, True):
        model = adapted(llama(), method="bat")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        trained(adapted(llama(), method="bat"), engine_of(model, config(3)))


def check_compiling(folder):
    plain, x = adapted(nn.Sequential(nn.Linear(8, 6))), torch.randn(2, 8)
    engine = engine_of(copy.deepcopy(plain), config(3))
    engine.compile(backend="eager")
    for _ in range(2):
        close(engine(x), plain(x))


def check_common_configurations(folder):
    """Few samples at a time, parameters and optimizer on the CPU, and 16 bits."""
    accumulating = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    offloading = {"offload_optimizer": {"device": "cpu"}}
    for stage in STAGES:
        trained(adapted(llama()), engine_of(adapted(llama()), config(stage, **accumulating)))
        if stage == 3:
            offloading["offload_param"] = {"device": "cpu"}
        trained(adapted(llama()), engine_of(adapted(llama()), config(stage, offloading)))
        in_16_bits = config(stage, bf16={"enabled": True})
        trained(adapted(llama()), engine_of(adapted(llama()), in_16_bits), tolerance=1e-2)
    plain, model = (adapted(adapted(llama()), adapter="first") for _ in range(2))
    engine = engine_of(model, config(3))
    for adapter in ("first", "default"):  # ZeRO-3 has noted what a step reads when another one acts
        for one in (plain, model):
            disha.set_active_adapters(one, adapter)
        trained(plain, engine, steps=1)


def check_models_made_in_parts(folder):
    """Under `zero.Init`, no rank ever has the whole model. Blocks are made in it or after it."""
    import deepspeed

    base = mixtral().state_dict()
    plain = adapted(mixtral())
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model, other = mixtral(), mixtral()
        adapted(model)
        started = disha.adapter_state_dict(model)
    assert all(bool(value.any()) for value in started.values())
    for one in (model, other):
        for name, parameter in one.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(base.get(name, parameter.data))
    disha.load_adapter_state_dict(model, disha.adapter_state_dict(plain))
    trained(plain, engine_of(model, config(3)))
    disha.save_adapter(model, folder / "adapter")
    dist.barrier()
    with warnings.catch_warnings(action="error", category=disha.AdapterFileWarning):  # same base
        disha.load_adapter(mixtral(), folder / "adapter")
        disha.load_adapter(other, folder / "adapter")
    close(disha.adapter_state_dict(other), disha.adapter_state_dict(plain))


def check_saving_and_loading(folder):
    for stage in STAGES:
        plain, other = adapted(llama(), also_train="norm"), adapted(llama(), also_train="norm")
        engine = engine_of(adapted(llama(), also_train="norm"), config(stage), lr=0.0)
        model = engine.module
        disha.save_adapter(engine, folder / f"{stage}-{dist.get_rank()}")
        dist.barrier()
        assert (folder / f"{stage}-1").exists() == (stage == 2)  # with ZeRO-3, rank 0 writes
        disha.save_adapter(plain, folder / f"{dist.get_rank()}")
        assert (folder / f"{stage}-0").read_bytes() == (folder / f"{dist.get_rank()}").read_bytes()
        for parameter in disha.adapter_parameters(other):
            parameter.data.add_(1)
        disha.save_adapter(other, folder / f"other-{dist.get_rank()}")
        disha.load_adapter(engine, folder / f"other-{dist.get_rank()}", replace=True)
        close(logits(engine), logits(other))
        # The copy that the optimizer trains was written too, or a step would bring back its values.
        engine.backward(engine(input_ids=batch(), labels=batch()).loss)
        engine.step()
        expected = disha.adapter_state_dict(other)
        assert_state_is(model, expected)
        wrong = {key: value + 1 for key, value in expected.items()}
        if dist.get_rank() == 1:
            wrong["lm_head.disha.default.bone_block"] = torch.zeros(1)
        if stage == 3:  # as for all ranks that share a model, an error on one is one on all
            with pytest.raises(disha.AdapterStateError, match=r"lm_head.*has the shape"):
                disha.load_adapter_state_dict(model, wrong)
            assert_state_is(model, expected)


def assert_state_is(model, expected):
    torch.testing.assert_close(disha.adapter_state_dict(model), expected, rtol=0, atol=0)


def check_running(folder):
    for stage in STAGES:
        plain = adapted(llama()).eval()
        engine = engine_of(adapted(llama()), config(stage))
        engine.eval()
        model, prompt = engine.module, batch()[:, :3]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
        with disha.adapters_disabled(model), disha.adapters_disabled(plain):
            close(logits(engine), logits(plain))
        names = ["default", None, None, "default"]
        with disha.route_adapters(model, names), disha.route_adapters(plain, names):
            close(logits(engine), logits(plain))
        # A part of the model, without the engine.
        x = torch.ones(2, 16)
        close(model.model.layers[0].mlp(x), plain.model.layers[0].mlp(x))


def check_reports(folder):
    import deepspeed

    for stage in STAGES:
        plain, engine = adapted(llama()), engine_of(adapted(llama()), config(stage))
        model, before = engine.module, disha.adapter_state_dict(adapted(llama()))
        assert disha.summary(engine) == disha.summary(plain)
        report = disha.check_adapters(engine, input_ids=batch())
        assert report.ok
        assert {one.merges for one in report.weights} == {None if stage == 3 else True}
        assert_state_is(model, before)
        with pytest.raises(disha.TargetError, match="is wrapped by DeepSpeedEngine"):
            disha.remove_adapters(engine)
        layer = model.lm_head
        assert layer.weight.dtype == torch.float32
        if stage == 2:
            disha.merge_adapters(model)
            close(logits(engine), logits(plain))
            disha.unmerge_adapters(model)
            continue
        with pytest.raises(disha.MergeError, match="sharded parameters"):
            disha.merge_adapters(model)
        with pytest.raises(disha.ModeError, match=r"call the model, or read it inside deepspeed"):
            layer.weight.norm()
        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            close(layer.weight.norm(), plain.lm_head.weight.norm())
            disha.save_adapter(model, folder / "adapter")
        trained(plain, engine, steps=1)  # nothing of this is left
