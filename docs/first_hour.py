# %% [markdown]
# # The first hour with disha
#
# This notebook takes a small model from nothing to a merged adapter. It downloads nothing, and
# every cell runs in a second on a processor. Install first, in a checkout: `pip install .`

# %%
import torch
from torch import nn

import disha

torch.manual_seed(0)


# %% [markdown]
# ## A model that was trained for something
#
# A recurrent network reads sequences of numbers, and says after each step whether their sum is
# positive. We train all of it first, as the base that somebody gives you.


# %%
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.mix = nn.Parameter(torch.randn(32, 32) / 32**0.5)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        states, _ = self.gru(x)
        return self.head(torch.einsum("bti,oi->bto", states, self.mix))


def labels_of(x, sign=1):
    return (sign * x.sum(-1).cumsum(-1) > 0).long()


def train(model, parameters, x, labels, steps=150):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def right(model, x, labels):
    with torch.no_grad():
        return f"{(model(x).argmax(-1) == labels).float().mean():.0%} right"


model, x = Tagger(), torch.randn(256, 8, 4)
train(model, model.parameters(), x, labels_of(x))
print("the base, at its own task:", right(model, x, labels_of(x)))

# %% [markdown]
# ## See what an adapter would adapt
#
# `plan_adapters` changes nothing. It shows what would be adapted, and what it needs to know from
# you: whether the raw parameter `mix` is used as `x @ mix.T` (the layout `out in`) or as `x @ mix`.

# %%
print(disha.plan_adapters(model, "all-linear", r=4))

# %% [markdown]
# Our `einsum` has `oi`, so the outputs come first: the layout is `out in`.

# %%
disha.inject_adapters(model, "all-linear", r=4, layouts={"^mix$": "out in"})
print("nothing has changed yet:", right(model, x, labels_of(x)))
print(disha.summary(model))

# %% [markdown]
# ## Check on your inputs that every block acts
#
# `check_adapters` runs the model, and tells for each weight whether the model reads it, whether its
# block changes the output, gets a gradient, and merges. It restores everything afterwards.

# %%
print(disha.check_adapters(model, x))

# %% [markdown]
# ## Teach it the opposite
#
# Only the blocks train. The base stays as it was, to the last bit.

# %%
opposite = labels_of(x, sign=-1)
print("before:", right(model, x, opposite))
train(model, disha.adapter_parameters(model), x, opposite)
print("after: ", right(model, x, opposite))

with disha.adapters_disabled(model):
    print("with the adapter switched off:", right(model, x, labels_of(x)))

# %% [markdown]
# ## Save it, and load it elsewhere
#
# The file has the blocks alone. It fits the base that it was trained on; on another base, loading
# warns.

# %%
disha.save_adapter(model, "opposite.safetensors", metadata={"task": "the opposite"})
print(disha.inspect_adapter("opposite.safetensors").metadata)

# %% [markdown]
# ## A second adapter, and one for each sample
#
# Adapters have names. Here the second one is random; `route_adapters` gives each half of the batch
# the adapter of its own. A recurrent layer computes one weight for all samples, so it can't be
# routed: this adapter has the head alone.

# %%
disha.remove_adapters(model)
for name in ("first", "second"):
    disha.inject_adapters(model, "head", r=4, adapter=name, init="kaiming")
names = ["first"] * 128 + ["second"] * 128
with torch.no_grad(), disha.route_adapters(model, names):
    both = model(x)
with torch.no_grad(), disha.adapters_active(model, "second"):
    alone = model(x[128:])
print("routed equals alone:", torch.allclose(both[128:], alone, atol=1e-5))
disha.remove_adapters(model)

# %% [markdown]
# ## Merge, and un-merge
#
# A merged model runs at the speed of the plain one. Un-merging puts the original weights back.

# %%
disha.load_adapter(model, "opposite.safetensors")
with torch.no_grad():
    outputs = model(x)
    disha.merge_adapters(model)
    print("merged, same outputs:", torch.allclose(model(x), outputs, atol=1e-4))
    disha.unmerge_adapters(model)
    print("un-merged, every bit:", torch.equal(model(x), outputs))

# %% [markdown]
# ## Where to go next
#
# - your own model: `docs/guides/custom-model.md`
# - a chat model, from data to a server: `docs/guides/tutorial.md`
# - which layers, which r, which learning rate: `docs/choosing.md`
# - something does not work: `docs/guides/troubleshooting.md`
