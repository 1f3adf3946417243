from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import disha
from disha.finetune.data.examples import IGNORED
from disha.finetune.models.factory import tensor_of
from disha.finetune.training.cross_entropy import TOKENS_TOGETHER, output_head, summed_cross_entropy
from disha.finetune.training.layers import enable_gradient_checkpointing
from disha.finetune.training.objectives import TextObjective
from tests.finetune.training.tiny import batch_of, decoder, examples

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_CONFIG = GPT2Config(vocab_size=200, n_positions=64, n_embd=16, n_layer=2, n_head=2)
MAMBA_CONFIG = MambaConfig(vocab_size=200, hidden_size=16, state_size=4, num_hidden_layers=2)
MODELS = {
    "decoder": lambda: decoder(),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2_CONFIG),
    "mamba": lambda: MambaForCausalLM(MAMBA_CONFIG),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def whole_loss(model, batch):
    """The loss of the complete logits, as anyone would write it."""
    logits = tensor_of(model(batch.tokens))
    kind = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(kind), batch.labels.flatten(), reduction="sum")


def gradients_of(loss, model):
    model.zero_grad()
    (2 * loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same_gradients(model, objective, batch, **tolerance):
    expected = gradients_of(whole_loss(model, batch), model)
    found = gradients_of(objective(batch), model)
    assert expected
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize("together", [1, 7, 1000])
@pytest.mark.parametrize("learns", ["hidden", "head", "both"])
def test_values_and_gradients_are_those_of_the_whole_logits(learns, together):
    torch.manual_seed(0)
    head = nn.Linear(6, 50).double().requires_grad_(learns != "hidden")
    hidden = torch.randn(3, 9, 6, dtype=torch.float64, requires_grad=learns != "head")
    labels = torch.randint(50, (3, 9))
    labels[torch.rand(3, 9) < 0.4] = IGNORED
    sources = [one for one in (hidden, *head.parameters()) if one.requires_grad]
    whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    trained = [one for one in head.parameters() if one.requires_grad]
    found = summed_cross_entropy(hidden, labels, head, trained, together=together)
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=0)
    pairs = (torch.autograd.grad(0.5 * loss, sources) for loss in (found, whole))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_model_is_that_of_its_whole_logits(name):
    """Every parameter is trained: those of the head, which are tied in some, and all before it."""
    model, batch = made(name), batch_of(examples(5))
    assert output_head(model, {}) is not None
    objective = TextObjective(model)
    torch.testing.assert_close(
        objective(batch), whole_loss(model, batch).float(), rtol=1e-6, atol=0
    )
    # Mamba computes its logits in float32.
    tolerance = (1e-3, 1e-5) if name == "mamba" else (1e-9, 1e-10)
    require_same_gradients(model, objective, batch, rtol=tolerance[0], atol=tolerance[1])
    with torch.no_grad():
        assert torch.equal(objective(batch), objective(batch).detach())


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_an_adapted_head_learns_too(method):
    model = disha.inject_adapters(made("llama"), "lm_head|q_proj", 4, method=method)
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.normal_(std=0.1)
    batch, objective = batch_of(examples(5)), TextObjective(model)
    require_same_gradients(model, objective, batch, rtol=1e-9, atol=1e-10)
    assert any("lm_head" in name for name in gradients_of(objective(batch), model))


@pytest.mark.parametrize("autocast", [False, True])
def test_products_in_bfloat16_are_rounded_as_often(autocast):
    model = made("decoder", torch.float32 if autocast else torch.bfloat16)
    batch, objective = batch_of(examples(5)), TextObjective(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = whole_loss(model, batch), objective(batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        require_same_gradients(model, objective, batch, rtol=2e-2, atol=2e-2)


def test_logits_are_made_for_some_tokens_at_a_time_and_only_for_those_with_a_label(monkeypatch):
    monkeypatch.setitem(summed_cross_entropy.__kwdefaults__, "together", 16)
    model, batch = made("llama"), batch_of(examples(5))
    objective, sizes = TextObjective(model), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape))
    objective(batch)
    in_model, *parts = sizes
    assert in_model[-1] == 1  # the model itself gets a stand-in
    assert sum(size[0] for size in parts) == batch.weight
    assert max(size[0] for size in parts) == 16 < TOKENS_TOGETHER


class Unusual(nn.Module):
    """A language model whose logits are not what its head returns."""

    def __init__(self, change):
        super().__init__()
        self.embedding, self.head = nn.Embedding(200, 8), nn.Linear(8, 200)
        self.change = change

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        return self.change(self, self.embedding(tokens))


CHANGES = {
    "a bias": lambda model, x: model.head(x) + 1.5,
    "an unknown factor": lambda model, x: 1.5 * model.head(x),
    "a cap": lambda model, x: torch.tanh(model.head(x) / 100) * 100,
    "only the last": lambda model, x: model.head(x.flip(1)).flip(1),
    "fewer words": lambda model, x: model.head(x)[..., :199],
    "called twice": lambda model, x: model.head(x) - 0 * model.head(x),
    "not called": lambda model, x: F.linear(x, model.head.weight),
    "by place": lambda model, x: model.head(x)[..., torch.arange(200)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_its_logits_makes_them_itself(change):
    torch.manual_seed(0)
    model = Unusual(CHANGES[change]).double()
    assert output_head(model, {}) is None
    batch = batch_of(examples(4))
    batch.labels[batch.labels == 199] = 5
    require_same_gradients(model, TextObjective(model), batch, rtol=1e-9, atol=1e-10)


def test_nothing_of_the_model_is_changed_by_the_proof():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 8), nn.BatchNorm1d(2), nn.Linear(8, 200)).train()
    model.get_output_embeddings = lambda: model[2]
    model[2].forward = own = lambda x: F.linear(x, model[2].weight)  # as by a device hook
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert output_head(model, {}) is not None
    assert model[2].forward is own
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputing_changes_nothing():
    batch, losses = batch_of(examples(5)), []
    for change in (lambda model: None, enable_gradient_checkpointing):
        model = disha.inject_adapters(made("llama", torch.float32), "lm_head|q_proj", 4)
        objective = TextObjective(model).train()
        change(model)
        loss = objective(batch)
        losses.append((loss.detach(), gradients_of(loss, model)))
    for loss, gradients in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, losses[0][1], rtol=1e-3, atol=1e-4)


def test_a_failing_model_has_its_head_back():
    model = made("llama")
    objective, forward = TextObjective(model), model.lm_head.forward
    bad = SimpleNamespace(tokens=torch.tensor([[999]]), labels=torch.tensor([[1]]), positions=None)
    with pytest.raises(IndexError):
        objective(bad)
    assert model.lm_head.forward == forward
