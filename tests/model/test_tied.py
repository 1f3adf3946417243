"""One parameter in several modules: one block, one update, one merge."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import disha
from disha import AdapterFileError, AdapterStateError, MergeError, load_adapter, save_adapter
from tests import language_models
from tests.conftest import COPIES, SizesMade, Tied, freshly_compiled, perturb, refused
from tests.reference import BONE_KINDS, KINDS, settings_of

WORDS = 36
TOKENS = torch.tensor([[1, 5, 3, 35, 2, 2], [0, 7, 33, 12, 1, 4]])


def llama(words=WORDS):
    tied = {**language_models.SMALLER, "tie_word_embeddings": True, "initializer_range": 0.2}
    return language_models.llama(vocab_size=words, **tied).double().eval()


def gpt2():
    options = {"n_layer": 1, "bos_token_id": 0, "eos_token_id": 0}
    return language_models.gpt2(vocab_size=WORDS, **options).double().eval()


class Small(nn.Module):
    """A table that is also the head, a layer between them, and nothing else to compile."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, 16)
        self.q_proj = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, WORDS, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.q_proj(self.embed_tokens(tokens)).tanh())


def dense_like(model, make):
    """A plain model with E + dE, computed, in both places."""
    layers = [module for module in model.modules() if isinstance(module, disha.AdaptedLayer)]
    ((layer, block),) = (
        (layer, block) for layer in layers for block in layer.disha.blocks_by_name().values()
    )
    dense = make()
    dense.get_input_embeddings().weight = nn.Parameter(
        (layer.base_weight + block.scale * layer.delta_weight(block)).detach()
    )
    dense.tie_weights()
    assert dense.lm_head.weight is dense.get_input_embeddings().weight
    return dense


def loss_of(model):
    return model(TOKENS).logits.sin().sum()  # transformers computes its own in float32


TARGETS = {"embedding": "embed_tokens|wte", "head": "lm_head", "both": "embed_tokens|wte|lm_head"}


TABLES = [
    (*table, r)
    for table, r in zip(
        itertools.product([llama, gpt2], TARGETS, KINDS),
        itertools.cycle([4, 5, 5, 4]),
        strict=False,
    )
]
"""Each model with each target and kind of block; the two r take turns, for each kind too."""


@pytest.mark.parametrize(("make", "target", "kind", "r"), TABLES)
class TestOneUpdate:
    """Of a table that is also the head, wherever the adapter was asked for."""

    def adapted(self, make, target, kind, r):
        return disha.inject_adapters(make(), TARGETS[target], r, scale=0.5, **settings_of(kind, 4))

    def test_both_read_it(self, make, target, kind, r):
        model = self.adapted(make, target, kind, r)
        assert torch.equal(model(TOKENS).logits, make()(TOKENS).logits)
        perturb(model)
        (block,) = disha.adapter_parameters(model)
        assert [key for key in model.state_dict() if "disha" in key] == [
            key for key, parameter in model.named_parameters() if parameter is block
        ]
        torch.testing.assert_close(model(TOKENS).logits, dense_like(model, make)(TOKENS).logits)

    def test_its_gradient_is_that_of_both(self, make, target, kind, r):
        """By finite differences of the dense model."""
        model = perturb(self.adapted(make, target, kind, r))
        (block,) = disha.adapter_parameters(model)
        loss_of(model).backward()
        step = 1e-3 * torch.randn_like(block)  # Llama has norms in float32
        losses = {}
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                next(iter(disha.adapter_parameters(moved))).add_(step, alpha=sign)
                losses[sign] = loss_of(dense_like(moved, make))
        difference = (losses[1] - losses[-1]) / 2
        torch.testing.assert_close(difference, (step * block.grad).sum(), rtol=3e-3, atol=0)

    def test_it_is_merged_once_and_goes(self, make, target, kind, r):
        model = perturb(self.adapted(make, target, kind, r))
        expected = model(TOKENS).logits
        assert disha.check_adapters(model, TOKENS).ok
        disha.merge_adapters(model)
        torch.testing.assert_close(model(TOKENS).logits, expected)
        head, embedding = model.lm_head, model.get_input_embeddings()
        assert head._parameters["weight"] is embedding._parameters["weight"]
        disha.unmerge_adapters(model)
        assert torch.equal(model(TOKENS).logits, expected)
        disha.remove_adapters(model)
        assert torch.equal(model(TOKENS).logits, make()(TOKENS).logits)
        assert [type(head), type(embedding)] == [nn.Linear, nn.Embedding]


WITHOUT_CPP = "aot_eager_decomp_partition"
"""Gets the graphs that inductor gets, and does not compile C++, which takes seconds for each."""


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same(kind):
    backend = "inductor" if kind in ("bone", "bat") else WITHOUT_CPP
    model = perturb(disha.inject_adapters(Small(), "embed_tokens", 4, **settings_of(kind, 4)))
    (block,) = disha.adapter_parameters(model)
    found = []
    for run in (model, freshly_compiled(model, backend)):
        loss = run(TOKENS).sin().sum()
        found.append((loss, *torch.autograd.grad(loss, block)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BONE_KINDS)
def test_a_step_makes_no_dense_table(kind):
    model = disha.inject_adapters(llama(words=5003), "embed_tokens", 4, **settings_of(kind, 4))
    with SizesMade() as made:
        model(TOKENS[:, :3], labels=TOKENS[:, :3]).loss.backward()
    assert max(made.sizes) < 5003 * 16


@pytest.mark.parametrize("way", COPIES)
def test_copies_read_their_own_block(way):
    model = perturb(disha.inject_adapters(llama(), "embed_tokens", 4))
    expected = model(TOKENS).logits
    other = COPIES[way](model)
    assert torch.equal(other(TOKENS).logits, expected)
    (block,) = disha.adapter_parameters(other)
    block.detach().zero_()
    assert torch.equal(other(TOKENS).logits, llama()(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, expected)


def test_tying_and_assigning_again_keep_the_update():
    model = perturb(disha.inject_adapters(llama(), "embed_tokens", 4))
    expected = model(TOKENS).logits
    model.tie_weights()
    assert torch.equal(model(TOKENS).logits, expected)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(model(TOKENS).logits, expected)
    disha.merge_adapters(model)  # also where this has untied the two
    torch.testing.assert_close(model(TOKENS).logits, expected)


def test_exclude_leaves_the_head_plain(tmp_path):
    plan = disha.plan_adapters(llama(), "embed_tokens", 4, exclude="lm_head")
    assert "one shared parameter" not in str(plan)
    shared = str(disha.plan_adapters(llama(), "embed_tokens", 4))
    assert "one shared parameter: model.embed_tokens.weight, lm_head.weight" in shared
    model = perturb(disha.inject_adapters(llama(), "embed_tokens", 4, exclude="lm_head"))
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(MergeError, match=r"shared with lm_head.weight.*untie"):
        disha.merge_adapters(model)
    save_adapter(model, tmp_path / "file")
    again = llama()
    load_adapter(again, tmp_path / "file")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_says_who_reads_it(tmp_path, target):
    model = perturb(disha.inject_adapters(llama(), TARGETS[target], 4))
    save_adapter(model, tmp_path / "file")
    again, untied = llama(), llama()
    load_adapter(again, tmp_path / "file")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(AdapterFileError, match=r"its weight is also .*tie them"):
        load_adapter(untied, tmp_path / "file")


def layers_with_one_weight(*names):
    """Return linear layers of one weight, in this order."""
    layers = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    weight = nn.Parameter(torch.ones(4, 4))
    for layer in layers.values():
        layer.weight = weight
    return layers


def test_a_file_replaces_an_adapter_of_layers_in_another_order(tmp_path):
    save_adapter(disha.inject_adapters(layers_with_one_weight(*"xyz"), ".", 2), tmp_path / "file")
    model = layers_with_one_weight(*"xzy")
    load_adapter(model, tmp_path / "file")
    report = load_adapter(model, tmp_path / "file", replace=True)
    assert report.matched == ("x.bone_block",)


def test_a_file_may_know_a_tied_layer_by_its_second_name(tmp_path):
    save_adapter(disha.inject_adapters(layers_with_one_weight(*"xy"), ".", 2), tmp_path / "file")
    model = layers_with_one_weight("x", "first")
    model["y"] = model["first"]
    load_adapter(model, tmp_path / "file")
    assert list(model["y"].disha) == ["default"]


def test_a_part_with_a_borrowed_block_alone_is_not_saved(tmp_path):
    model = disha.inject_adapters(llama(), "embed_tokens|q_proj", 4)
    part = nn.ModuleList([model.model.layers, model.lm_head])
    with refused(part, AdapterStateError, r"1\.weight is tied to a parameter outside this part"):
        save_adapter(part, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_the_layout_of_a_tied_weight_is_that_of_its_first_adapter():
    """Also if that adapter leaves out the side which gets another one."""
    model = disha.inject_adapters(llama(), "embed_tokens", 4, exclude="lm_head")
    with refused(model, disha.TargetError, "another adapter has it with the layout 'index out'"):
        disha.inject_adapters(model, "lm_head", 4, adapter="b")


def test_adapters_come_from_either_side():
    """A second adapter has the layout of the first; what is left plain by one may read another."""
    model = disha.inject_adapters(llama(), "embed_tokens", 4, adapter="a", exclude="lm_head")
    perturb(disha.inject_adapters(model, "embed_tokens", 2, adapter="b"))
    disha.set_active_adapters(model, ["a", "b"])
    embedding, head = model.get_input_embeddings(), model.lm_head
    a, b = (embedding.delta_weight(embedding.disha[name]) for name in "ab")
    torch.testing.assert_close(embedding.weight.clone(), embedding.base_weight + a + b)
    torch.testing.assert_close(head.weight.clone(), head.base_weight + b)
    with pytest.raises(disha.TargetError, match="another adapter has it with the layout"):
        disha.inject_adapters(model, "lm_head", 4, adapter="c")
    with disha.route_adapters(model, ["a", "b"]):
        routed = model(TOKENS).logits
    for row, name in enumerate("ab"):
        with disha.adapters_active(model, name):
            torch.testing.assert_close(routed[row], model(TOKENS).logits[row])


def test_transposed_convolutions_of_a_tied_autoencoder_see_the_update():
    layer = perturb(disha.inject_adapters(nn.Conv2d(4, 4, 3).double(), "", 4))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = F.conv_transpose2d(x, layer.weight.clone())
    torch.testing.assert_close(F.conv_transpose2d(x, layer.weight), expected)


def test_a_save_names_what_was_tied_after_the_injection(tmp_path):
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    disha.inject_adapters(model, "head", 2)
    save_adapter(model, tmp_path)
    model["head"].weight = model["table"].weight
    with pytest.warns(UserWarning, match=r"head\.weight with table\.weight\. Tie first"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("part", ["embed", "head"])
def test_a_copy_of_one_side_has_its_block_in_its_state_dict(part):
    model = perturb(disha.inject_adapters(Tied(), "embed|head", 2))
    layer = copy.deepcopy(getattr(model, part))
    assert "disha.default.bone_block" in layer.state_dict()
    assert torch.equal(layer.weight.clone(), model.embed.weight.clone())
    whole = copy.deepcopy(model)
    assert whole.state_dict().keys() == model.state_dict().keys()
