"""What stands in front of a class whose forward is not the one that a layer kind knows.

`Around`: the class's own forward runs and, by `super().forward`, reaches the kind's; where it does
not get there (bitsandbytes calls its own kernels), the update is added to what it returns.
`ReadLayer`: the layer's weight is read, by the module around it say, and what is read is the weight
with the updates in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from disha import functional
from disha.errors import ArgumentError, ArgumentTypeError, ModeError
from disha.layers import quantised
from disha.layers.adapted import AdaptedLayer, attach, current_caller
from disha.layers.classes import Moved, move
from disha.sharding import is_sharded

__all__ = ["Around", "ReadLayer", "adapt"]


class Around(AdaptedLayer):
    """In front of a forward that is not ours: sees to it that the update is applied once."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward behind; add the update if it did not get to the layer kind's forward."""
        if self.library_forward and self.disha.merged is not None and self.disha.merged.dense:
            dense_output: Tensor = self.layer_kind.forward(self, self._input(*args, **kwargs))
            return dense_output
        calls = self.disha.calls
        caller = current_caller()
        outer = calls.get(caller)
        calls[caller] = False
        try:
            output = self._run_behind(super().forward, *args, **kwargs)
            reached = calls[caller]
            missed = () if reached else self.disha.acting()
        finally:
            del calls[caller]
            if outer is not None:
                calls[caller] = True  # a call within its own forward has applied the update
        if reached or not (missed or self.disha.route):
            return output
        input = self._input(*args, **kwargs)
        if not isinstance(output, Tensor) or not isinstance(input, Tensor):
            raise ArgumentTypeError(
                f"the adapter of {self.original_class.__name__} can't act: adding to the output of "
                f"its forward needs one tensor in and one out, but it takes {type(input).__name__} "
                f"and returns {type(output).__name__}; leave it out with exclude="
            )
        return self.updated(output, missed, input)

    def _input(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs.get(self.input_name)

    def _run_behind(self, forward: Callable[..., Tensor], /, *args: Any, **kwargs: Any) -> Tensor:
        if self.library_forward:
            weight: Tensor = getattr(self, self.weight_name)
            bias, input = self._parameters["bias"], self._input(*args, **kwargs)
            if quantised.loses_gradients(weight, bias, input):
                return quantised.with_gradients(self, weight, forward, input)
        return forward(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        merged = self.disha.merged
        if self.library_forward and merged is not None and merged.dense:
            # A dense weight is saved as a plain layer's, without the quantised one's scales.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)


class ReadLayer(AdaptedLayer):
    """In front of a layer whose weight is read, now or at times, instead of its being called.

    Reading gives W + sum of s dW, and so calling runs the class's own forward with that.
    """

    kind_goes_first = True

    @classmethod
    def facts_before(cls, kind: type[Moved], original: type[nn.Module]) -> dict[str, Any]:
        """Return the attributes that show the weight with the updates in it."""
        assert issubclass(kind, AdaptedLayer)
        facts: dict[str, Any] = {kind.weight_name: property(cls.effective_weight)}
        if hasattr(original, "reset_parameters"):
            facts["reset_parameters"] = cls.reset_own_parameters
        return facts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the original class: it reads the weight with the updates in it."""
        return self.original_class.forward(self, *args, **kwargs)

    def __delattr__(self, name: str) -> None:
        if name == self.weight_name and name in self._parameters:
            raise ArgumentError(
                f"the {name} of a {self.original_class.__name__} that the module around it reads "
                "can't be replaced by one that is computed (a parametrization, say) while the "
                "layer is adapted; remove the adapters first"
            )
        super().__delattr__(name)

    def reset_own_parameters(self) -> None:
        """Reset the parameters as the classes behind do, which write into what they read."""
        active = self.disha.active
        self.disha.activate(())
        try:
            super().reset_parameters()  # type: ignore[misc]
        finally:
            self.disha.activate(active)

    def effective_weight(self) -> Tensor:
        """Return W + sum of s dW of the acting adapters, with its graph.

        Raises:
            ModeError: samples are routed, and there is one weight for all of them.
        """
        weight = self._parameters[self.weight_name]
        assert weight is not None  # see __delattr__
        adapters = self.disha
        if adapters.route is not None and adapters.enabled:
            raise ModeError(
                f"a {self.original_class.__name__} can't run each sample with an adapter of its "
                "own: what runs it reads its weight, one for the whole batch, instead of calling "
                "it; use one adapter at a time, or exclude the layer"
            )
        acting = adapters.acting()
        # FSDP looks its shards up by name, to keep them: an update in them would stay for good.
        if not acting or _between_passes(weight, *(block.block for block in acting)):
            return weight
        try:
            deltas = [(self.delta_weight(block), block.current_scale()) for block in acting]
            return functional.merged_weight(weight, deltas)
        except AttributeError as error:
            # nn.Module would answer with the plain parameter: an adapter without effect.
            raise RuntimeError(f"the update of the weight failed: {error}") from error


def _between_passes(*tensors: Tensor) -> bool:
    """Whether all tensors are parts of what they stand for, as between the passes of FSDP."""
    return not torch.compiler.is_compiling() and all(map(is_sharded, tensors))


def adapt(module: nn.Module, kind: type[AdaptedLayer], *, read: bool = False) -> AdaptedLayer:
    """Move `module` to its adapted class, without any adapter yet. Undone by `restore`.

    Args:
        module: the module.
        kind: the kind of layer that it is.
        read: whether its owner reads its weight instead of calling it.

    Raises:
        ArgumentError: the module's class does not allow it.
    """
    layer = move(module, kind, _front(type(module), kind, read))
    attach(layer)
    return layer


def _front(original: type[nn.Module], kind: type[AdaptedLayer], read: bool) -> type[Moved] | None:
    """Return what must stand before a kind and a module's class for updates to take effect."""
    if read:
        return ReadLayer
    known = kind.base_class is not None and original.forward is kind.base_class.forward
    return None if known else Around
