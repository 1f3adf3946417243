"""FSDP2 on two ranks: training, files, state dicts, control, and what is refused."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import disha
from disha import (
    AdapterFileError,
    AdapterIOError,
    AdapterStateError,
    ArgumentError,
    ConversionError,
    MergeError,
    TargetError,
)
from disha.interop import image_lora
from disha.layers.fingerprints import fingerprint
from disha.model.computed_weights import computed_weights
from disha.model.view import ModelView
from tests.conftest import perturb
from tests.distributed.harness import (
    ADAPTERS,
    Block,
    Model,
    adapted,
    adapted_attention,
    assert_same,
    assert_trains_alike,
    assert_trains_alike_while_routed,
    batch,
    blocks,
    close,
    loss_of,
    own_part,
    rank,
    saved,
    train,
    whole,
)
from tests.peft_models import assert_same_folders
from tests.processes import RANKS
from tests.reference import METHODS


def sharded(model, **options):
    """Shard block by block, then the rest with the root, as one does."""
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def from_rank(culprit, message):
    """What an error says that one rank causes: there, and on the other."""
    return f"^{message}" if rank() == culprit else f"^on rank {culprit}: {message}"


def check_training(folder):
    for case in ADAPTERS:
        model = sharded(adapted(case))
        assert disha.check_adapters(model, batch()).ok
        assert_trains_alike(adapted(case), model)


def check_a_lora_starts_where_new_memory_is_given(folder):
    with torch.device("meta"):
        model = disha.inject_adapters(Model(), "all-linear", 3, method="lora")
    sharded(model).to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            block = whole(layer.disha["default"].block)
            assert block[:, : layer.in_features].abs().min() > 0
            assert not block[:, layer.in_features :].any()


def check_computed_weights(folder):
    for case in ADAPTERS:
        plain = dict(computed_weights(ModelView(adapted(case))))
        computed = dict(computed_weights(ModelView(sharded(adapted(case)))))
        assert computed.keys() == plain.keys()
        for name, weight in computed.items():
            close(weight, plain[name])


def check_attention(folder):
    for method in METHODS:
        plain, model = adapted_attention(method), adapted_attention(method)
        for layer in model.encoder.layers:
            fully_shard(layer)
        fully_shard(model)
        alone, path = folder / f"{method}-{rank()}", folder / method
        disha.save_adapter(plain, alone)
        assert saved(model, path) == alone.read_bytes()
        assert_trains_alike(plain, model)
        disha.load_adapter(model, path, replace=True)
        assert_same(blocks(model), blocks(adapted_attention(method)))


def check_sharded_layers_and_resharding(folder):
    """Every adapted layer a group of its own, and parameters left whole after the forward."""
    model = adapted("bat")
    for _, module in list(model.named_modules()):
        if isinstance(module, disha.AdaptedLayer):
            fully_shard(module)
    assert_trains_alike(adapted("bat"), fully_shard(model))
    assert_trains_alike(adapted(), sharded(adapted(), reshard_after_forward=False))


def check_a_read_between_forwards(folder):
    layer = disha.inject_adapters(nn.Sequential(nn.Linear(8, 6)), "0", r=2, init="kaiming")[0]
    expected = layer.weight + 0
    fully_shard(layer)
    with pytest.raises(disha.ModeError, match=r"call module\.unshard"):
        layer.weight + 0
    layer.unshard()
    assert torch.equal(layer.weight + 0, expected)
    assert ModelView(layer).is_sharded  # although its parameters are whole now


def check_a_bfloat16_base_with_float32_blocks(folder):
    """The blocks, their gradients and the file stay in float32."""

    def make():
        torch.manual_seed(0)
        model = Model().to(torch.bfloat16)
        return perturb(disha.inject_adapters(model, "up|down|head|conv", 3, dtype=torch.float32))

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options, tolerance in (({}, 1e-5), ({"mp_policy": half}, 0.05)):
        plain, model = make(), sharded(make(), **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo of torch 2.8 adds up for a mean too
                module.set_force_sum_reduction_for_comms(True)
        loss_of(model, own_part(batch())).backward()
        for part in batch().chunk(RANKS):  # products in bfloat16 round each part by itself
            (loss_of(plain, part) / RANKS).backward()
        pairs = zip(disha.adapter_parameters(model), disha.adapter_parameters(plain), strict=True)
        for block, expected in pairs:
            assert block.dtype == block.grad.dtype == torch.float32
            error = (whole(block.grad) - expected.grad).norm() / expected.grad.norm()
            assert error < tolerance
        name = f"{len(options)}"
        assert saved(model, folder / name) == saved(plain, folder / f"{name}plain{rank()}")


def check_saved_file_is_that_of_the_plain_model(folder):
    for index, case in enumerate(ADAPTERS):
        plain = adapted(case)
        for adapter in dict.fromkeys(one.get("adapter", "default") for one in ADAPTERS[case]):
            path = folder / f"{index}{adapter}"
            expected = saved(plain, folder / f"{index}{adapter}-plain{rank()}", adapter)
            for options in ({}, {"reshard_after_forward": False}):
                model = sharded(adapted(case), **options)
                assert saved(model, path, adapter) == expected
                with torch.no_grad():  # which leaves the root's parameters whole
                    model(batch())
                assert saved(model, path, adapter) == expected
    assert len(list(folder.iterdir())) == len(ADAPTERS) * 3 + 3  # no left-overs


def check_failed_save_raises_on_all_ranks(folder):
    model = sharded(adapted())
    with pytest.raises(AdapterIOError, match="No such file"):
        disha.save_adapter(model, folder / "absent" / "a")
    with pytest.raises(disha.ArgumentTypeError, match="metadata must be"):
        disha.save_adapter(model, folder / "a", metadata={"a": 3})
    # only one rank errs, and the other does not wait for it
    with pytest.raises(disha.ArgumentTypeError, match=from_rank(1, "path must be")):
        disha.save_adapter(model, 3 if rank() == 1 else folder / "a")
    with pytest.raises(
        ArgumentError, match="no adapter 'b'" if rank() == 1 else "rank 1 was asked to"
    ):
        disha.save_adapter(model, folder / "a", "b" if rank() == 1 else "default")
    with torch.no_grad():
        disha.adapter_parameters(model)[0].to_local()[:] = float("nan")
    with pytest.raises(AdapterStateError, match="not finite"):
        disha.save_adapter(model, folder / "a")
    assert not list(folder.iterdir())


def check_export_as_lora(folder):
    for case in sorted(ADAPTERS.keys() - {"tied"}):  # it is refused
        alone, path = folder / f"{case} {rank()}", folder / case
        model = sharded(adapted(case), reshard_after_forward=False)
        with torch.no_grad():
            model(batch())  # leaves whole parameters behind
        expected = disha.interop.lora.export(adapted(case), alone, rank=2)
        report = disha.interop.lora.export(model, path, rank=2)
        assert report.layers == expected.layers
        assert_same_folders(path, alone)
    with pytest.raises(disha.ArgumentTypeError, match=from_rank(1, "rank must be an int")):
        disha.interop.lora.export(model, folder / "a", rank="2" if rank() == 1 else 2)
    with pytest.raises(disha.ArgumentTypeError, match=from_rank(1, "path must be")):
        disha.interop.lora.export(model, 3 if rank() == 1 else folder / "a")
    assert not (folder / "a").exists()


def check_hot_swap(folder):
    for case in ("bone", "bat", "conv and embedding, r=1"):
        source, model = adapted(case, seed=5), sharded(adapted(case), reshard_after_forward=False)
        path = folder / case
        if rank() == 0:
            disha.set_adapter_scale(source, 0.5)
            disha.save_adapter(source, path, metadata={"of": case})
        dist.barrier()
        disha.set_adapter_scale(source, 0.5)
        with torch.no_grad():
            model(batch())  # leaves whole parameters behind, and writing to them would be lost
        parameters = list(disha.adapter_parameters(model))
        report = disha.load_adapter(model, path, replace=True)
        assert report.complete
        assert all(map(DTensor.is_same_size, parameters, disha.adapter_parameters(model)))
        close(model(batch()), source(batch()))
        assert_same(blocks(model), blocks(source))  # which registers the shards again
        assert_trains_alike(source, model)


def check_refused_load_changes_no_rank(folder):
    model = sharded(adapted())
    before = blocks(model)
    if rank() == 0:
        disha.save_adapter(adapted(seed=5), folder / "fits")
        disha.save_adapter(adapted("tile"), folder / "other")
    dist.barrier()
    with pytest.raises(AdapterFileError, match="does not fit the model"):
        disha.load_adapter(model, folder / "other", replace=True)
    with pytest.raises(ArgumentError, match="replace=True"):
        disha.load_adapter(model, folder / "fits")
    with pytest.raises(AdapterFileError, match="inject first, then wrap"):
        disha.load_adapter(model, folder / "fits", adapter="new")
    # one rank alone can't read it
    with pytest.raises(AdapterIOError, match=from_rank(1, "can't read")):
        disha.load_adapter(model, folder / ("fits", "absent")[rank()], replace=True)
    assert_same(blocks(model), before)


def check_peft_folders(folder):
    def trained(seed):
        torch.manual_seed(0)
        model = Model().double()
        return perturb(disha.inject_adapters(model, "up|down", 3, also_train=r"norm\.|head"), seed)

    plain, model = trained(0), sharded(trained(0))
    alone, together = folder / f"{rank()}", folder / "a"
    disha.interop.peft.export(plain, alone)
    disha.interop.peft.export(model, together)
    assert_same_folders(together, alone)
    other = sharded(trained(5))
    disha.interop.peft.load(other, together, replace=True)
    assert_same(blocks(other), blocks(plain))
    with pytest.raises(AdapterIOError, match=from_rank(1, "can't read")):
        disha.interop.peft.load(other, (together, folder / "absent")[rank()], replace=True)
    if rank() == 1:
        disha.set_adapter_scale(model, 2.0)
    with pytest.raises(ConversionError, match=from_rank(1, "the adapter can't be written")):
        disha.interop.peft.export(model, folder / "none")
    assert not (folder / "none").exists()


def check_image_loras(folder):
    def models(seed, shard=lambda model: model):
        """Return two models of a pipeline, the first of them whole on each rank."""
        torch.manual_seed(0)
        both = [disha.inject_adapters(Model().double(), "up|down", 3) for _ in range(2)]
        text_encoder, unet = (perturb(model, seed) for model in both)
        return {"text_encoder": text_encoder, "unet": shard(unet)}

    plain, together = models(0), models(0, sharded)
    alone, path = folder / f"{rank()}", folder / "a"
    image_lora.export(plain, alone)
    image_lora.export(together, path)
    assert path.read_bytes() == alone.read_bytes()
    other = models(5, sharded)
    image_lora.load(other, path, replace=True)
    assert_same(blocks(other["unet"]), blocks(plain["unet"]))
    # one rank alone can't read or write it
    with pytest.raises(AdapterIOError, match=from_rank(1, "can't read")):
        image_lora.load(other, (path, folder / "absent")[rank()], replace=True)
    with pytest.raises(disha.ArgumentTypeError, match=from_rank(1, "path must be")):
        image_lora.export(together, 3 if rank() == 1 else path)
    # one rank alone has another model, or broken values, where each rank has the whole model
    other = models(5, sharded)
    if rank() == 1:
        disha.adapter_parameters(together["text_encoder"])[0].data[:] = float("nan")
        disha.remove_adapters(other["text_encoder"])
        disha.inject_adapters(other["text_encoder"], "up", 2)
    with pytest.raises(AdapterFileError, match=from_rank(1, ".* does not fit the model")):
        image_lora.load(other, path, replace=True)
    assert_same(blocks(other["unet"]), blocks(models(5)["unet"]))
    with pytest.raises(AdapterStateError, match=from_rank(1, ".*not finite")):
        image_lora.export(together, path)


def check_state_dicts(folder):
    model, source = sharded(adapted()), adapted(seed=5)
    with torch.no_grad():
        model(batch())
    state, values = disha.adapter_state_dict(model), disha.adapter_state_dict(source)
    whole_state = model.state_dict()
    assert list(state) == list(values)
    for key, value in state.items():
        assert isinstance(value, DTensor)
        assert value.to_local().data_ptr() == whole_state[key].to_local().data_ptr()
    disha.load_adapter_state_dict(model, values)
    assert_same(blocks(model), blocks(source))
    doubled = {key: value * 2 for key, value in disha.adapter_state_dict(model).items()}
    assert all(isinstance(value, DTensor) for value in doubled.values())
    disha.load_adapter_state_dict(model, doubled)
    assert_same(blocks(model), [2 * block for block in blocks(source)])

    before = blocks(model)
    key = next(iter(values))
    broken = {**values, key: torch.full_like(values[key], float("nan"))}
    with pytest.raises(AdapterStateError, match=from_rank(1, "the state does not fit")):
        disha.load_adapter_state_dict(model, broken if rank() == 1 else values)
    with pytest.raises(
        (AttributeError, disha.DishaError), match=from_rank(0, "'list' object has no attribute")
    ):
        disha.load_adapter_state_dict(model, [] if rank() == 0 else values)
    assert_same(blocks(model), before)
    with pytest.raises(AdapterStateError, match="is sharded, but the parameter is not"):
        disha.load_adapter_state_dict(source, doubled)


def check_checkpoints_of_torch(folder):
    """The keys of torch.distributed.checkpoint are those of the plain model."""
    model, source = sharded(adapted()), adapted(seed=5)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank() == 0:  # where torch puts the whole state
        assert set(state) == set(disha.adapter_state_dict(source))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(
        model, disha.adapter_state_dict(source) if rank() == 0 else {}, options=options
    )
    assert_same(blocks(model), blocks(source))
    part = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert set(part) == set(disha.adapter_state_dict(source))
    set_model_state_dict(
        model,
        {key: value * 2 for key, value in part.items()},
        options=StateDictOptions(strict=False),
    )
    assert_same(blocks(model), [2 * block for block in blocks(source)])


def check_adapters_in_checkpoints_of_torch(folder):
    """Saved from two ranks, they load on one rank and on two, in place."""
    path = folder / "checkpoint"
    dcp.save(disha.adapter_state_dict(sharded(adapted(seed=5))), checkpoint_id=path)
    source, plain, model = adapted(seed=5), adapted(), sharded(adapted())
    dcp.load(disha.adapter_state_dict(plain), checkpoint_id=path, no_dist=True)
    assert_same(blocks(plain), blocks(source))
    dcp.load(disha.adapter_state_dict(model), checkpoint_id=path)
    assert_same(blocks(model), blocks(source))

    alone = folder / f"alone{rank()}"
    dcp.save(disha.adapter_state_dict(source), checkpoint_id=alone, no_dist=True)
    dist.barrier()
    model = sharded(adapted())
    dcp.load(disha.adapter_state_dict(model), checkpoint_id=folder / "alone0")
    assert_same(blocks(model), blocks(source))


def check_fingerprints(folder):
    """Of a sharded weight as of the whole one: uneven and empty parts, both dimensions, -0.0."""
    values = torch.randn(9, 10)
    values[0] = -0.0
    for size in ((9, 10), (3, 30), (1, 90), (90, 1)):
        for dtype in (torch.float64, torch.bfloat16):
            layer = nn.Linear(1, 1)
            layer.weight = nn.Parameter(values.view(size).to(dtype))
            expected = fingerprint(layer.weight)
            assert fingerprint(fully_shard(layer).weight) == expected

    layer = nn.Linear(10, 8)
    expected = fingerprint(layer.weight)
    fully_shard(layer, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    assert layer.weight.placements == (Shard(1),)
    assert fingerprint(layer.weight) == expected


def check_two_dimensional_meshes(folder):
    """Replicas of shards, and shards of tensor parallelism's shards, which are no plain chunks."""
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
        model, source = fully_shard(adapted(), mesh=mesh), adapted(seed=5)
        path = folder / f"{shape}"
        assert saved(model, path) == saved(adapted(), folder / f"plain{rank()}")
        with pytest.raises(disha.ArgumentTypeError, match=from_rank(1, "path must be")):
            disha.save_adapter(model, 3 if rank() else path)
        disha.load_adapter_state_dict(model, disha.adapter_state_dict(source))
        assert_same(blocks(model), blocks(source))

        layer = nn.Linear(10, 8)
        expected = fingerprint(layer.weight)
        parallelize_module(layer, mesh["inner"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["outer"])
        assert fingerprint(layer.weight) == expected


def check_tensor_parallel_models(folder):
    """Parallelize, inject, shard: training and files are those of one process."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("outer", "inner"))
    for method in METHODS:
        models = []
        for plan in ({}, {"up": ColwiseParallel(), "down": RowwiseParallel()}):
            torch.manual_seed(0)
            model = Model(hidden=8).double()
            for block in model.blocks if plan else ():
                parallelize_module(block, mesh["inner"], plan)
            perturb(disha.inject_adapters(model, "up|down|head", 2, method=method))
            models.append(model)
        plain, model = models
        sharded(model, mesh=mesh["outer"])
        close(train(model, batch()), train(plain, batch()))
        path = folder / method
        disha.save_adapter(model, path)
        torch.manual_seed(0)
        loaded = Model(hidden=8).double()
        disha.load_adapter(loaded, path)
        close(loaded(batch()), plain(batch()))
        disha.load_adapter(model, path, replace=True)
        close(model(batch()), plain(batch()))


def check_control(folder):
    plain, model = adapted("two at once"), sharded(adapted("two at once"))
    tokens = batch()
    assert disha.summary(model) == disha.summary(plain)
    names = ["default", "second", None, "default"]

    def outputs(of):
        yield of(tokens)
        disha.set_active_adapters(of, "second")
        disha.set_adapter_scale(of, 0.5, "second")
        yield of(tokens)
        with disha.adapters_disabled(of):
            yield of(tokens)
        with disha.route_adapters(of, names):
            yield of(tokens)
        disha.set_active_adapters(of, [])
        yield of(tokens)

    with torch.no_grad():
        close(list(outputs(model)), list(outputs(plain)))
    first = disha.adapter_parameters(model)[0]
    assert isinstance(first, DTensor)  # not what the forward has left there
    for of in (plain, model):
        of.requires_grad_(True)
        disha.mark_only_adapters_trainable(of)
        disha.set_active_adapters(of, ["default", "second"])
    assert_trains_alike(plain, model)


def check_training_while_routed(folder):
    assert_trains_alike_while_routed(sharded(adapted("two at once")))


def check_refusals(folder):
    model = sharded(adapted("two at once"))
    classes = [type(module) for module in model.modules()]
    before = blocks(model)
    with pytest.raises(TargetError, match="inject first, then wrap"):
        disha.inject_adapters(model, "all-linear", 2, adapter="new")
    with pytest.raises(TargetError, match=r"can't remove adapters: .* set_active_adapters"):
        disha.remove_adapters(model)
    with pytest.raises(TargetError, match="combine first, then wrap"):
        disha.combine_adapters(model, {"default": 1.0}, into="new")
    with pytest.raises(MergeError, match="merge it into the plain model"):
        disha.merge_adapters(model)
    merged = adapted()
    disha.merge_adapters(merged)
    expected = merged(batch()).detach()
    sharded(merged)
    with pytest.raises(
        MergeError, match="can't unmerge adapters in a model with sharded parameters"
    ):
        disha.unmerge_adapters(merged)
    close(merged(batch()), expected)
    assert [type(module) for module in model.modules()] == classes
    assert_same(blocks(model), before)


def check_activation_checkpointing(folder):
    plain, model = saved(adapted(), folder / f"plain{rank()}"), adapted()
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, Block)
    )
    assert saved(sharded(model), folder / "a") == plain
    assert_trains_alike(adapted(), model)


def check_compiled(folder):
    plain = saved(adapted(), folder / f"plain{rank()}")
    before = adapted()
    for block in before.blocks:
        block.compile(backend="eager")
    after = torch.compile(sharded(adapted()), backend="eager")
    for model in (sharded(adapted(compiled=True)), sharded(before), after):
        assert saved(model, folder / "a") == plain
        assert_trains_alike(adapted(), model)
