"""Cross-entropy over a large vocabulary, without keeping its logits.

The output head turns each hidden state h into one logit per word. For 4,000 tokens and 128,000
words, these are 2 GB, and their gradient as much again. Here the head sees a few tokens at a time.
The gradient of h is computed with the loss, so that the logits of these tokens can go at once.

The head gets only tokens with a label. It multiplies no more often than usual: once for the logits,
and once for the gradient of h. If the head is trained or adapted, its parameters get their
gradients in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha.finetune.data.examples import IGNORED
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.factory import tensor_of

__all__ = ["OutputHead", "output_head", "summed_cross_entropy"]

TOKENS_TOGETHER = 256
"""How many tokens have logits at a time."""

Logits: TypeAlias = Callable[[Tensor], Tensor]


def summed_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    logits: Logits,
    trained: Sequence[nn.Parameter] = (),
    *,
    together: int = TOKENS_TOGETHER,
) -> Tensor:
    """Return the cross-entropy, summed over the tokens that have a label, in nats.

    Args:
        hidden: (batch, time, width) what the head is given.
        labels: (batch, time) the token that should follow each, or `IGNORED`.
        logits: turns hidden states (tokens, width) into logits (tokens, vocabulary).
        trained: the parameters of `logits` that need gradients.
        together: how many tokens have logits at a time.

    Returns:
        A scalar in float32, or in float64 if the hidden states are float64.
    """
    supervised = labels != IGNORED
    sources = (hidden[supervised], *trained)
    if not torch.is_grad_enabled():
        sources = (sources[0].detach(),)
    loss: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, labels[supervised], together, *sources
    )
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes gradients in forward. Backward only multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Logits, labels: Tensor, together: int, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        learns_hidden, *_ = ctx.needs_input_grad[3:]
        total = torch.zeros((), dtype=_exact(hidden), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if learns_hidden else None
        # A sum over many parts needs more digits than each part.
        of_trained = [torch.zeros_like(one, dtype=_exact(one)) for one in trained]
        for start in range(0, len(labels), together):
            part = slice(start, start + together)
            given = hidden[part].detach().requires_grad_(learns_hidden)
            sources = [*([given] * learns_hidden), *trained]
            with torch.set_grad_enabled(bool(sources)):
                found = logits(given)
            chances = F.log_softmax(found.detach(), -1, dtype=_exact(found))
            places = torch.arange(len(chances), device=chances.device), labels[part]
            total -= chances[places].sum()
            if not sources:
                continue
            slope = chances.exp_()  # d loss / d logits = softmax - one at the label
            slope[places] -= 1
            gradients = list(torch.autograd.grad(found, sources, slope.to(found.dtype)))
            if of_hidden is not None:
                of_hidden[part] = gradients.pop(0)
            for summed, gradient in zip(of_trained, gradients, strict=True):
                summed += gradient
        ctx.save_for_backward(
            of_hidden,
            *(summed.to(one.dtype) for summed, one in zip(of_trained, trained, strict=True)),
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        found = [None if one is None else one * scale.to(one.dtype) for one in ctx.saved_tensors]
        return None, None, None, *found


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# --- the head of a model -------------------------------------------------------------------------

TAILS: Mapping[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": lambda cap, logits: torch.tanh(logits / cap) * cap,
    "logits_scaling": lambda divisor, logits: logits / divisor,
    "logit_scale": lambda factor, logits: logits * factor,
}
"""What models of `transformers` do with the logits of their head, by the name in their config."""


class OutputHead:
    """The last layer of a language model, which can be left out of its forward.

    Args:
        model: a model that names its head by a method `get_output_embeddings`.
        tail: what the model does with the logits of its head.
    """

    def __init__(self, model: nn.Module, tail: Logits) -> None:
        self._model = model
        self._tail = tail

    @property
    def module(self) -> nn.Module:
        """The head, with its adapters."""
        return self._model.get_output_embeddings()  # type: ignore[no-any-return,operator]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The head's parameters that are trained."""
        return [one for one in self.module.parameters() if one.requires_grad]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits (..., vocabulary) for what its head is given."""
        return self._tail(self.module(hidden))

    def hidden(self, tokens: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Call the model without its head.

        Args:
            tokens: (batch, time) token ids.
            options: what the model is called with besides tokens.

        Returns:
            What the head is given: (batch, time, width).
        """
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[..., :1]  # small, because the model may still compute with it

        with _replaced(self.module, keep):
            self._model(tokens, **options)
        return seen[0]


def output_head(model: nn.Module, options: Mapping[str, Any]) -> OutputHead | None:
    """Return the head of a model, if it is known what the model does with the head's logits.

    For the built-in decoder it is known. Any other model is run on two tokens. Its head returns
    known numbers, and the model must return what it is expected to make of them.

    Args:
        model: any language model, neither compiled nor distributed yet.
        options: what it is called with besides tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        return None
    if isinstance(model, Decoder):
        return OutputHead(model, _unchanged)
    was_training, device = model.training, next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    forward, known = head.forward, list[Tensor]()

    def give_known(hidden: Tensor) -> Tensor:
        logits = forward(hidden)
        known.append(torch.linspace(-64, 64, logits.numel()).view(logits.shape).to(logits))
        return known[-1]

    model.eval()
    try:
        with torch.no_grad(), _replaced(head, give_known):
            returned = tensor_of(model(tokens, **options))
        for tail in _tails(model):
            if torch.equal(tail(known[0]).to(returned.dtype), returned) and len(known) == 1:
                found = OutputHead(model, tail)
                with torch.no_grad():
                    found.hidden(tokens, options)
                return found
    except Exception:  # then the model is called as a whole, and that call says what is wrong
        return None
    finally:
        model.train(was_training)
    return None


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _tails(model: nn.Module) -> Iterator[Logits]:
    yield _unchanged
    for name, tail in TAILS.items():
        value = getattr(getattr(model, "config", None), name, None)
        if value is not None:
            yield partial(tail, value)


@contextmanager
def _replaced(head: nn.Module, forward: Logits) -> Iterator[None]:
    """Replace the forward of the head inside the block."""
    own = vars(head).get("forward")  # the head may have its own already, such as from device hooks
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
