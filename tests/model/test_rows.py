"""Rows of a matrix that are trained and saved beside an adapter, such as those of new tokens."""

import copy

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import disha
from disha import (
    AdapterFileError,
    ArgumentError,
    ArgumentTypeError,
    ConversionError,
    TargetError,
    inspect_adapter,
    load_adapter,
    save_adapter,
)
from disha.interop import lora
from tests.adapter_files import rewritten
from tests.conftest import freshly_compiled, perturb, refused, seed_torch
from tests.language_models import SIZES
from tests.model.test_tied import TOKENS, WORDS, Small, gpt2, llama
from tests.peft_models import rewrite

NEW = [3, 34, 35]
OTHERS = [number for number in range(WORDS) if number not in NEW]
ROWS = {"embed_tokens|wte": NEW}


def untied():
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.config.tie_word_embeddings = False
    return model


def trained(make=llama, **options):
    options = {"also_train_rows": ROWS, **options}
    return perturb(disha.inject_adapters(make(), "q_proj|c_attn", 4, **options))


def rows_of(model, adapter="default"):
    """The values of the trained rows (rows, width)."""
    return model.get_input_embeddings().disha[adapter].block.mT


@pytest.mark.parametrize("make", [llama, gpt2, untied])
def test_it_is_training_all_rows_but_only_these(make):
    """The same as a dense table of which an optimizer takes the gradient of some rows."""
    model, dense = (disha.inject_adapters(make(), "q_proj|c_attn", 4) for _ in range(2))
    disha.remove_adapters(model)
    model = disha.inject_adapters(model, "q_proj|c_attn", 4, also_train_rows=ROWS)
    assert torch.equal(model(TOKENS).logits, make()(TOKENS).logits)
    table = dense.get_input_embeddings().weight.requires_grad_()
    kept = table.detach().clone()
    parameters = disha.adapter_parameters(model)
    assert sum(one.numel() for one in parameters) < table.numel()
    steps = [torch.optim.SGD(own, 0.1) for own in (parameters, [*dense.parameters()])]
    for _ in range(3):
        for one, optimizer in zip((model, dense), steps, strict=True):
            optimizer.zero_grad()
            one(TOKENS).logits.sin().sum().backward()
        for parameter in dense.parameters():
            if parameter.requires_grad and parameter is not table and parameter.dim() > 2:
                parameter.grad = None
        table.grad[OTHERS] = 0
        for optimizer in steps:
            optimizer.step()
    assert torch.equal(table[OTHERS], kept[OTHERS])
    torch.testing.assert_close(rows_of(model), table[NEW], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.get_input_embeddings().base_weight, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_other_rows_keep_every_bit(dtype):
    model = llama().to(dtype)
    weight = model.get_input_embeddings().weight
    weight.data[OTHERS[::2]] *= -0.0  # a sum would make these 0.0
    kept, bits = weight.detach().clone(), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    model = perturb(disha.inject_adapters(model, "q_proj", 4, also_train_rows=ROWS))
    expected = model(TOKENS).logits
    disha.merge_adapters(model)
    merged = model.lm_head._parameters["weight"]
    assert torch.equal(merged[OTHERS].view(bits), kept[OTHERS].view(bits))
    torch.testing.assert_close(merged[NEW], rows_of(model).to(dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0.05, atol=0.05)
    disha.unmerge_adapters(model)
    assert torch.equal(model.lm_head.base_weight.view(bits), kept.view(bits))


def test_adapters_have_rows_of_their_own():
    model = trained()
    perturb(disha.inject_adapters(model, "v_proj", 4, adapter="b", also_train_rows={"embed": [4]}))
    disha.set_active_adapters(model, ["default", "b"])
    table = llama().get_input_embeddings().weight.detach().clone()
    table[NEW], table[4] = rows_of(model).detach(), rows_of(model, "b")[0].detach()
    torch.testing.assert_close(model.lm_head.weight.clone(), table)
    assert disha.check_adapters(model, TOKENS).ok
    with disha.adapters_disabled(model):
        assert torch.equal(model(TOKENS).logits, llama()(TOKENS).logits)
    with disha.route_adapters(model, ["default", "b"]):
        routed = model(TOKENS).logits
    with disha.adapters_active(model, "b"):
        torch.testing.assert_close(routed[1], model(TOKENS).logits[1])
    disha.set_active_adapters(model, "default")
    disha.set_adapter_scale(model, 0.5)
    assert torch.equal(model.lm_head.weight[NEW], table[NEW])  # a row has no scale
    assert {row.scale for row in disha.summary(model).layers if row.is_new_rows} == {1}
    disha.remove_adapters(model)
    assert torch.equal(model(TOKENS).logits, llama()(TOKENS).logits)


@pytest.mark.parametrize("order", [["default", "b"], ["b", "default"]])
@pytest.mark.parametrize("update_first", [False, True])
def test_a_row_is_read_in_place_of_all_else_and_the_last_adapter_gives_it(update_first, order):
    injections = [
        {"target_regex": "q_proj", "also_train": "norm", "also_train_rows": ROWS},
        {"target_regex": "v_proj", "adapter": "b", "also_train_rows": {"embed": [3]}},
    ]
    injections.insert(0 if update_first else 2, {"target_regex": "embed", "adapter": "update"})
    model = llama()
    for injection in injections:
        perturb(disha.inject_adapters(model, r=4, **injection))
    disha.set_active_adapters(model, "update")
    expected = model.get_input_embeddings().weight.detach().clone()
    expected[NEW] = rows_of(model).detach()
    if order[-1] == "b":
        expected[3] = rows_of(model, "b")[0].detach()
    disha.set_active_adapters(model, ["update", *order])
    assert torch.equal(model.lm_head.weight.clone(), expected)
    assert torch.equal(model.get_input_embeddings()(TOKENS), expected[TOKENS])
    x = torch.randn(2, 16).double()
    torch.testing.assert_close(model.lm_head(x), F.linear(x, expected))
    disha.merge_adapters(model)
    assert torch.equal(model.lm_head.weight, expected)


def test_a_table_of_which_rows_train_does_not_train_whole():
    model = llama()
    with refused(model, disha.ArgumentError, "also_train_rows trains rows of it"):
        disha.inject_adapters(model, "q_proj", 4, also_train="lm_head", also_train_rows=ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_has_its_value_whatever_w_has(dtype):
    """W + (D - W) is 0 where W is 1000, and NaN where W is."""
    table = nn.Embedding(4, 8).to(dtype)
    table.weight.data[1], table.weight.data[2] = 1000.0, torch.nan
    layer = disha.inject_adapters(
        nn.Sequential(table, nn.Linear(8, 2)), "1", 2, also_train_rows={"0": [1, 2]}
    )
    rows = layer[0].disha["default"].block
    rows.data = torch.randn(8, 2) / 1000
    expected = rows.mT.to(dtype)
    x = torch.randn(3, 8).to(dtype)
    assert torch.equal(layer[0](torch.tensor([1, 2])), expected)
    assert torch.equal(layer[0].weight[1:3].clone(), expected)
    assert torch.equal(F.linear(x, layer[0].weight)[:, 1:3], F.linear(x, expected))
    layer[0].base_weight.data[2] = 0  # else the merged weight would not be finite
    disha.merge_adapters(layer)
    assert torch.equal(layer[0].weight[1:3], expected)


def test_what_changes_other_blocks_leaves_the_rows():
    """A dtype would round them, and `reset_parameters` of a block set them to zero."""
    model = disha.inject_adapters(
        llama(), "q_proj", 4, also_train_rows=ROWS, dtype=torch.bfloat16, init="kaiming", scale=0.5
    )
    base = llama().get_input_embeddings().weight
    assert torch.equal(rows_of(model), base[NEW])
    perturb(model)
    rows = rows_of(model).detach().clone()
    for module in model.model.embed_tokens.disha.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(rows_of(model), rows)


def table(seed):
    seed_torch(seed)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))


def test_a_model_with_rows_is_checked():
    model = disha.inject_adapters(table(0), "1", 2, also_train_rows={"0": [1, 2]})
    assert disha.check_adapters(perturb(model), torch.tensor([1, 2, 3])).ok


def test_a_base_that_is_loaded_later_keeps_the_trained_rows_and_no_others():
    model = disha.inject_adapters(table(0), "1", 2, also_train_rows={"0": [1, 2, 8]})
    model.load_state_dict(table(1).state_dict())
    assert torch.equal(model[0].weight.clone(), table(1)[0].weight)
    rows = model[0].disha["default"].block
    rows.data[:, 1] += 1.0  # training
    expected = table(2)[0].weight.detach().clone()
    expected[2] = rows[:, 1].detach()
    model.load_state_dict(table(2).state_dict())
    assert torch.equal(model[0].weight.clone(), expected)


def test_a_base_that_is_loaded_by_the_name_of_the_tied_head():
    model = disha.inject_adapters(Small(), "q_proj", 4, also_train_rows=ROWS)
    model.load_state_dict({"lm_head.weight": torch.ones(WORDS, 16)}, strict=False)
    assert torch.equal(model.embed_tokens.weight.clone(), torch.ones(WORDS, 16))


@pytest.mark.parametrize("base_first", [False, True])
def test_rows_that_are_loaded_into_empty_memory_stay(base_first):
    trained_rows = torch.randn(4, 3)
    with torch.device("meta"):
        model = table(0)
    disha.inject_adapters(model, "1", 2, also_train_rows={"0": [1, 2, 8]})
    model.to_empty(device="cpu")
    if base_first:
        model.load_state_dict(table(1).state_dict())
        assert torch.equal(model[0].weight.clone(), table(1)[0].weight)
    state = disha.adapter_state_dict(model)
    key, other_key = state
    assert base_first or state[key].isnan().all()
    disha.load_adapter_state_dict(model, {key: trained_rows, other_key: torch.zeros(2, 9)})
    model.load_state_dict(table(2).state_dict())
    assert torch.equal(model[0].weight[[1, 2, 8]], trained_rows.mT)
    assert torch.equal(model[0].weight[3:8], table(2)[0].weight[3:8])


def test_rows_that_are_loaded_onto_the_meta_device_act_in_compiled_code():
    full = perturb(disha.inject_adapters(table(0), "1", 2, also_train_rows={"0": [1, 2, 8]}))
    with torch.device("meta"):
        model = disha.inject_adapters(table(0), "1", 2, also_train_rows={"0": [1, 2, 8]})
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(freshly_compiled(model)(TOKENS % 9), full(TOKENS % 9))


def test_a_file_has_the_rows_only_and_fits_a_base_with_others(tmp_path):
    plain = disha.inject_adapters(llama(), "q_proj", 4, r_out=2)
    save_adapter(plain, tmp_path / "plain")
    model = trained(r_out=2)  # which does not divide the rows
    save_adapter(model, tmp_path / "file")
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "file")]
    assert sizes[1] - sizes[0] < 8 * rows_of(model).numel() + 400
    (found,) = (one for one in inspect_adapter(tmp_path / "file").layers if one.is_new_rows)
    assert (found.name, found.outputs) == ("model.embed_tokens", ((3, 4), (34, 35), (35, 36)))
    other = llama()
    other.get_input_embeddings().weight.data[NEW] += 1.0
    load_adapter(other, tmp_path / "file")
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)
    save_adapter(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    load_adapter(other, tmp_path / "plain", replace=True)  # it has no rows: those of the base act
    assert torch.equal(other.lm_head.weight[NEW], other.lm_head.base_weight[NEW])
    smaller = llama(words=30)
    with pytest.raises(AdapterFileError, match=r"rows .* are out of range: it has 30 rows"):
        load_adapter(smaller, tmp_path / "file")


def test_a_file_of_an_earlier_version_that_calls_rows_a_method(tmp_path):
    """It has a scale that they do not have, and, without other layers, a method of this name."""
    model = trained()
    save_adapter(model, tmp_path / "all")
    load_adapter(part := llama(), tmp_path / "all", layers="embed")
    save_adapter(part, tmp_path / "rows")
    rewritten(tmp_path / "all", change_header=lambda header: header["layers"][0].update(scale=0.5))

    def name_the_method(header):
        header["config"]["method"] = header["layers"][0].pop("method")

    rewritten(tmp_path / "rows", change_header=name_the_method)
    for name in ("all", "rows"):
        load_adapter(found := llama(), tmp_path / name)
        assert torch.equal(found.lm_head.weight[NEW], rows_of(model))

    def make_all_new(header):
        del header["layers"][0]["rows"]

    rewritten(tmp_path / "rows", change_header=make_all_new)
    load_adapter(found := llama(words=3), tmp_path / "rows")
    assert torch.equal(found.lm_head.weight.clone(), rows_of(model))


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ({"embed": [WORDS]}, TargetError, "out of range: it has 36 rows"),
        ({"embed": [-1]}, ArgumentError, "rows from 0"),
        ({"embed": [3, 3]}, ArgumentError, "each once"),
        ({"embed": ["a"]}, ArgumentTypeError, "a list of row numbers"),
        ({"embed": 3}, ArgumentTypeError, "a list of row numbers"),
        ({"tokens_of": [3]}, TargetError, r"also_train_rows=\['tokens_of'\] selects no layer"),
        ({"norm": [3]}, TargetError, "'norm'.* can't be adapted"),
    ],
)
def test_rows_that_there_are_not(rows, error, says):
    model = llama()
    with refused(model, error, says):
        disha.inject_adapters(model, "q_proj", 4, also_train_rows=rows)


@pytest.mark.parametrize(
    "kind", [numpy.array, torch.tensor, tuple, lambda rows: map(numpy.int64, rows)]
)
def test_row_numbers_of_numpy_and_torch(kind):
    model = disha.inject_adapters(llama(), "q_proj", 4, also_train_rows={"embed": kind(NEW)})
    assert rows_of(model).shape == (3, 16)


def test_they_take_the_place_of_an_adapter_on_the_same_matrix():
    model = disha.inject_adapters(llama(), "embed|q_proj", 4, also_train_rows=ROWS)
    assert [one.method for one in disha.summary(model).layers] == ["rows", "bone"]


@pytest.mark.parametrize("read", ["lookup", "head", "product", "by an index"])
def test_every_reader_gets_the_rows(read):
    layer = disha.inject_adapters(nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 4)}),
                                  "b", 2, also_train_rows={"a": [2, (7, 9)]}).double()  # fmt: skip
    perturb(layer)
    weight, block = layer["a"].weight, layer["a"].disha["default"].block
    ids, x, y = torch.tensor([[2, 8], [0, 7]]), *torch.randn(2, 4, 9, dtype=torch.float64)
    product = {
        "lookup": lambda table: F.embedding(ids, table),
        "head": lambda table: F.linear(x.T, table, y[0]),
        "product": lambda table: (
            (y @ table @ x @ table).sin() @ table.T + torch.addmm(x[:, 0], y, table) @ x
        ),
        "by an index": lambda table: table[ids - 3],
    }[read]
    found, expected = product(weight), product(weight.clone())
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(one.sin().sum(), block)[0] for one in (found, expected))
    torch.testing.assert_close(*gradients)


def test_decay_draws_the_rows_to_zero():
    """As it would those of a table."""
    model = trained()
    rows = model.get_input_embeddings().disha["default"].block
    start = rows.detach().clone()
    rows.grad = torch.zeros_like(rows)
    torch.optim.AdamW([rows], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(rows.detach(), start * 0.95)


def test_compiled_code_has_the_rows():
    model = trained(Small)
    compiled = freshly_compiled(copy.deepcopy(model), "inductor")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6)
    with disha.adapters_disabled(compiled), disha.adapters_disabled(model):
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6)


def test_resetting_a_table_gives_the_rows_its_new_values():
    model = trained()
    table = model.get_input_embeddings()
    table.reset_parameters()
    assert torch.equal(rows_of(model), table.base_weight[NEW])


def gemma():
    """A model that scales its tied embedding."""
    seed_torch(0)
    config = Gemma3TextConfig(**{**SIZES, "vocab_size": WORDS, "head_dim": 4})
    return Gemma3ForCausalLM(config).double().eval()


@pytest.mark.parametrize("make", [llama, gpt2, untied, gemma])
def test_peft_computes_the_same_with_trainable_token_indices(make, tmp_path):
    base, names = make(), "embed_tokens|wte" if make is not untied else "embed_tokens|lm_head"
    model = trained(make, also_train_rows={names: NEW})
    lora.export(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_rows_that_peft_has_trained(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[35, 3])
    theirs = peft.get_peft_model(llama(), config)
    lora.export(disha.inject_adapters(llama(), "q_proj", 4), tmp_path / "plain")
    factors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens" in name:
            parameter.data.normal_()
        elif "lora_" in name:
            parameter.data.copy_(factors[name.replace(".default", "")])
    theirs.save_pretrained(tmp_path / "peft")
    model = llama()
    lora.load(model, tmp_path / "peft")
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    rewrite(tmp_path / "peft", trainable_token_indices={})
    with pytest.raises(disha.DishaError, match="list of row numbers"):
        lora.load(llama(), tmp_path / "peft")


def test_peft_can_not_hold_every_row(tmp_path):
    with pytest.raises(ConversionError, match="embed_tokens"):
        lora.export(trained(exclude="lm_head"), tmp_path)
    layers = {"head": nn.Linear(4, 6), "table": nn.Embedding(6, 4), "other": nn.Linear(4, 6)}
    model = nn.ModuleDict(layers)
    for tied in (False, True):  # PEFT forgets the bias of a layer with new rows
        if tied:
            model["head"].weight = model["table"].weight
        target = "table" if tied else "head"
        adapted = copy.deepcopy(model)
        disha.inject_adapters(adapted, "other", 2, also_train_rows={target: [1]})
        with pytest.raises(ConversionError, match=target):
            lora.export(adapted, tmp_path)
    with pytest.raises(ConversionError, match="PEFT's MiSS adapts all rows"):
        disha.interop.peft.export(trained(), tmp_path)
