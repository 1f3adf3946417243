"""What the scripts of this folder share, which `python -m tests.distributed` runs on two ranks.

Rank 0 notes in the folder which checks have passed. After a failed check the ranks are out of step,
so nothing more of the script is run.
"""

import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import disha
from tests.conftest import perturb
from tests.processes import RANKS

Check = Callable[[Path], None]


def checks_of(namespace: Mapping[str, object]) -> dict[str, Check]:
    return {name: value for name, value in namespace.items() if name.startswith("check_")}


def run_checks(namespace: Mapping[str, object], folder: Path) -> None:
    """Run the checks of a script, as one of its ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name, check in checks_of(namespace).items():
        own = folder / name
        own.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            check(own)
            dist.barrier()
        except BaseException:
            print(f"{name} failed on rank {dist.get_rank()}", file=sys.stderr)
            traceback.print_exc()
            sys.exit(1)
        if dist.get_rank() == 0:
            (own / "passed").touch()
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Sizes that two ranks can't cut evenly, and an embedding, a convolution, blocks, a head."""

    def __init__(self, width: int = 5, hidden: int = 7, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x.mT).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AttentionModel(nn.Module):
    """Packed projections: of the 18 rows of q, k and v, each of two ranks has one and a half."""

    def __init__(self, width: int = 6, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 7, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


def adapted_attention(method: str = "bone") -> AttentionModel:
    """Return the same model on every rank; no block is zero."""
    torch.manual_seed(0)
    model = AttentionModel().double()
    return perturb(disha.inject_adapters(model, "all-linear", 2, method=method))


ADAPTERS = {
    "bone": [{"target_regex": "all-linear", "r": 3, "also_train": r"norm\.weight"}],
    "tile": [{"target_regex": "up|down", "r": 2, "r_out": 1}],
    "groups": [{"target_regex": "all-linear", "r": 2, "groups": 2}],
    "bat": [{"target_regex": "all-linear", "r": 3, "method": "bat"}],
    "lora": [{"target_regex": "all-linear|embed", "r": 3, "method": "lora"}],
    "conv and embedding, r=1": [{"target_regex": "conv|embed|head", "r": 1}],
    "tied": [{"target_regex": "embed|up", "r": 3}],
    "tied, with rows": [{"target_regex": "up", "r": 3, "also_train_rows": {"embed": [2, 9, 10]}}],
    "two at once": [
        {"target_regex": "up|head", "r": 3, "adapter": "default"},
        {"target_regex": "all-linear", "r": 2, "method": "bat", "adapter": "second"},
    ],
}
"""Name -> the injections that make the model of a case."""


def adapted(
    case: str = "bone", dtype: torch.dtype = torch.float64, seed: int = 0, compiled: bool = False
) -> Model:
    """Return the same model on every rank, compiled before injection or not; no block is zero."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    if case.startswith("tied"):
        model.head.weight = model.embed.weight
        model.head.bias = None  # PEFT has no bias beside new rows
    if compiled:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, backend="eager")
    for injection in ADAPTERS[case]:
        disha.inject_adapters(model, **injection)
    disha.set_active_adapters(model, [one.get("adapter", "default") for one in ADAPTERS[case]])
    perturb(model, seed)
    return model


def rank() -> int:
    return dist.get_rank()


def saved(model: nn.Module, path: Path, adapter: str = "default") -> bytes:
    """Save from all ranks at once; return the bytes."""
    disha.save_adapter(model, path, adapter)
    return path.read_bytes()


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [whole(parameter.grad) for parameter in disha.adapter_parameters(model)]


def batch() -> torch.Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))


def own_part(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.chunk(RANKS)[dist.get_rank()]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


Steps = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 3) -> Steps:
    """Train what trains; return the loss and the gradients, by clean name, of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses, gradients = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            {clean(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    return losses, gradients


def clean(name: str) -> str:
    wrappers = {"module", "_orig_mod", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def assert_trains_alike(plain: nn.Module, wrapped: nn.Module) -> None:
    """Train the plain model on the whole batch, the wrapped one on each rank's part: all equal."""
    trainable = {name for name, p in plain.named_parameters() if p.requires_grad}
    expected_losses, expected = train(plain, batch())
    losses, gradients = train(wrapped, own_part(batch()))
    for loss, other in zip(expected_losses, losses, strict=True):
        dist.all_reduce(other)
        close(other / RANKS, loss)
    assert all(set(step) == trainable for step in expected)
    close(gradients, expected)


def assert_trains_alike_while_routed(wrapped: nn.Module) -> None:
    """Each rank's part of the batch uses the same adapters."""
    plain, names = adapted("two at once"), ["second", "default"]
    with disha.route_adapters(plain, names * RANKS), disha.route_adapters(wrapped, names):
        assert_trains_alike(plain, wrapped)


def close(actual: object, expected: object) -> None:
    """In float64 the order of sums is all that differs: some hundred terms, one step after another
    through AdamW, which divides small gradients by small ones."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def blocks(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    return [whole(block).detach().clone() for block in disha.adapter_parameters(model, adapter)]


def assert_same_on_all_ranks(model: nn.Module) -> None:
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, blocks(model))
    for other in everywhere:
        assert_same(everywhere[0], other)


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))
