"""A model as PEFT sees it: what it adapts there with the effect that we have, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from disha.interop.obstacles import PeftObstacles, class_of
from disha.interop.peft.folder import Saved
from disha.interop.saved_modules import own_buffers, saved_buffers
from disha.interop.targets import Targets, is_plain, saved_by
from disha.model import ModelView, join
from disha.sharding import whole

__all__ = ["PeftView"]


class PeftView:
    """A model, by the names that its modules have in PEFT.

    Args:
        view: the model, adapted or not, wrapped or not.
    """

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._names = view.names
        self._obstacles = PeftObstacles(view)
        self._parameters = view.parameters_by_name

    @property
    def modules(self) -> list[str]:
        """The names under which PEFT looks at modules: each once, by the first way to it."""
        return [names[0] for names in self._names.values() if names[0]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter, or None if the model has none of that name.

        That of a linear layer's weight is (out, in), however it is stored.
        """
        module = self._view.modules.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and isinstance(module, nn.Linear):
            return (module.out_features, module.in_features)
        parameter = self._parameters.get(name)
        return None if parameter is None else tuple(parameter.value.shape)

    # --- layers ----------------------------------------------------------------------------------

    def obstacles_to_load(self, layers: Iterable[str]) -> list[str]:
        """Return which of these layers PEFT adapts otherwise than we do, and why."""
        return self._obstacles_of(layers, self._obstacles.to_load)

    def obstacles_to_export(self, layers: Iterable[str]) -> list[str]:
        """Return in which of these layers an adapter would not act alike in PEFT, and why."""
        return self._obstacles_of(layers, self._obstacles.to_export)

    def _obstacles_of(
        self, layers: Iterable[str], obstacle: Callable[[str], str | None]
    ) -> list[str]:
        found = ((name, obstacle(name) or self._other_kind(name)) for name in layers)
        return [f"{name or '(the model)'}: {why}" for name, why in found if why is not None]

    def _other_kind(self, name: str) -> str | None:
        module = self._view.modules[name]
        if isinstance(module, nn.Linear):
            return None
        return f"PEFT's MiSS adapts nn.Linear only, and it is a {class_of(module).__name__}"

    def not_selected(self, targets: Targets, layers: Iterable[str]) -> list[str]:
        """Return the modules that a configuration selects besides these layers."""
        known = set(layers)
        return [name for name in self.modules if name not in known and targets.selects(name)]

    # --- what is beside them ---------------------------------------------------------------------

    def buffers(self) -> dict[str, Tensor]:
        """Return every name of every buffer that a state dict has -> its values."""
        return saved_buffers(self._view)

    def not_saved(self, modules: Sequence[str], keys: Iterable[str]) -> list[str]:
        """Return what PEFT saves of `modules_to_save` and is not among the keys of a folder."""
        known = set(keys)
        expected = (
            join(name, own_name)
            for module, (name, *_) in self._names.items()
            if name and saved_by(modules, name)
            for own_name in self._state(module)
        )
        return [key for key in dict.fromkeys(expected) if key not in known]

    def all_names(self, parameter: str) -> list[str]:
        """Return all names of the parameter of that name, first the one that it goes by."""
        return list(dict.fromkeys(self._parameters[parameter].names))

    def saved(
        self, also_train: Sequence[str], layers: Sequence[str], values: Mapping[str, Tensor]
    ) -> Saved:
        """Return how PEFT saves parameters that are trained beside an adapter.

        Args:
            also_train: names of the parameters.
            layers: names of the adapted layers.
            values: the parameters' values by these names.
        """
        trained = {alias for name in also_train for alias in self.all_names(name)}
        adapted = {self._view.modules[name] for name in layers if name in self._view.modules}
        whole_modules = self._trained_whole(trained, adapted)
        names = [name for module in whole_modules for name in self._names[module]]
        state = {
            join(name, inner): tensor
            for module in whole_modules
            for name in self._names[module]
            for inner, tensor in self._state(module).items()
        }
        rest = sorted(trained - set(state))
        bias, problems = _bias(rest, layers)
        problems += self._unclear(names, layers)
        tensors = {
            name: whole(state[name].detach()).cpu() if name not in self._parameters
            else values[self._parameters[name].name]
            for name in [*state, *rest]
        }  # fmt: skip
        # Copies: what shares memory can't be in one file.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return Saved(bias, tuple(sorted(names)), copies, tuple(problems))

    def _trained_whole(self, trained: set[str], adapted: set[nn.Module]) -> list[nn.Module]:
        """Return the modules all of whose parameters are trained, the outermost that own some."""
        found: list[nn.Module] = []
        inside = set[nn.Module]()
        for module, (name, *_) in self._names.items():
            if not name or module in inside:
                continue
            below = set(self._view.inside(module))
            own = any(join(name, one) in trained for one in module._parameters)
            parameters = (
                join(name, one) for one, value in self._state(module).items() if _trains(value)
            )
            if own and not below & adapted and trained.issuperset(parameters):
                found.append(module)
                inside |= below
        return found

    def _state(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the parameters and buffers that a module's state dict has, under clean names."""
        return {
            join(above, name): tensor
            for inner, above in self._view.inside(module).items()
            for name, tensor in [*inner._parameters.items(), *own_buffers(inner)]
            if tensor is not None
        }

    def _unclear(self, saved: Sequence[str], layers: Sequence[str]) -> list[str]:
        """Return why PEFT would save other modules than these, or not adapt all layers."""
        odd = [name for name in saved if not is_plain(name)]
        if odd:
            return [f"{name}: PEFT reads names of modules_to_save as regexes" for name in odd]
        more = [name for name in self._view.modules if name not in saved and saved_by(saved, name)]
        targets = Targets(None, saved=saved)
        return [
            f"{name}: PEFT would save and train it too, as its name ends in that of a module in "
            "modules_to_save"
            for name in more
        ] + [
            f"{name}: PEFT would not adapt it, as its name is read as being inside of a module in "
            "modules_to_save"
            for name in layers
            if targets.leaves_out(name)
        ]


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _bias(names: Sequence[str], layers: Sequence[str]) -> tuple[str, list[str]]:
    """Return PEFT's `bias` for parameters outside of whole modules, and what it can't express."""
    problems = [
        f"parameter {name}: PEFT trains whole modules and biases besides blocks, and this is "
        "neither"
        for name in names
        if name.rpartition(".")[2] != "bias"
    ]
    adapted = {join(layer, "bias") for layer in layers}
    return "none" if not names else "only" if adapted.issuperset(names) else "all", problems
