"""The weights that a model computes with, one at a time, for a program that runs a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from disha.errors import ModeError
from disha.functional.shard_sums import without_autocast
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.layers.quantized import quantized_weight
from disha.layers.weights import adapted_weights, base_of, read_weight, sum_with_updates
from disha.model.view import ModelView
from disha.sharding.tensors import gather
from disha.sharding.zero import gathered_parameter
from disha.text import join


@torch.no_grad()
def computed_weights(view: ModelView) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight by its name in the base: W + sum of s * dW where adapters are active.

    Nothing is merged, and only one weight is computed at a time. A quantised or parametrised weight
    is dense. A tied one comes once. Collective if the model is sharded.
    """
    inside_parametrizations: set[nn.Module] = set()
    blocks_of: dict[int, tuple[str, set[AdapterBlock]]] = {}
    for module, names in view.names.items():
        if module in inside_parametrizations:
            continue
        if is_parametrized(module):
            inside_parametrizations.update(module.parametrizations.modules())  # type: ignore[union-attr]
        for attribute in _weights_of(module):
            name = join(names[0], attribute)
            parameter = module._parameters.get(attribute)
            blocks: set[AdapterBlock] = set()
            if isinstance(module, AdaptedLayer):
                blocks = {*module.disha.blocks_for(attribute, module.disha.active)}
            if parameter is not None:
                first, of_first = blocks_of.setdefault(id(parameter), (name, blocks))
                if of_first != blocks:
                    raise ModeError(
                        f"{name} is tied to {first}, where not all of the same adapters act, so no "
                        "one weight is both; adapt both or neither (target_regex, exclude)"
                    )
                if first != name:
                    continue
            yield name, _compute(module, attribute)


def _weights_of(module: nn.Module) -> list[str]:
    """Return the names of a module's weights, as they were before it was quantised."""
    names = [name for name, value in dict(module._parameters).items() if value is not None]
    if quantized_weight(module) is not None:
        return ["weight"] + [name for name in names if name == "bias"]
    if is_parametrized(module):
        names += module.parametrizations  # type: ignore[arg-type]
    return names


def _compute(module: nn.Module, attribute: str) -> Tensor:
    """Return a weight of a module with its updates, dense and whole."""
    parameter = module._parameters.get(attribute)
    stored = [] if parameter is None else [parameter]
    if is_parametrized(module, attribute):
        stored = [*module.parametrizations[attribute].parameters()]  # type: ignore[index, union-attr]
    with ExitStack() as stack:
        for tensor in stored:
            stack.enter_context(gathered_parameter(tensor))
            stack.enter_context(without_autocast(tensor))
        if isinstance(module, AdaptedLayer):
            active = module.disha.active
            specs = adapted_weights(module, active)
            if attribute in specs:
                return sum_with_updates(module, specs[attribute], active)
        spec = quantized_weight(module)
        if spec is not None and attribute == spec.parameter:
            return gather(base_of(module, spec))
        return gather(read_weight(module, attribute))
