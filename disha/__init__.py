"""disha: dimension-sharded adapters (Bone, tile, BAT) for PyTorch models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from disha.errors import (
    AdapterFileError,
    AdapterFileWarning,
    AdapterIOError,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    ConversionError,
    DishaError,
    MergeError,
    MissingPackageError,
    ModeError,
    TargetError,
)
from disha.version import __version__

if TYPE_CHECKING:
    from disha import functional as functional
    from disha import integrations as integrations
    from disha import interop as interop
    from disha.files import (
        AdapterFile,
        combine_adapters,
        save_adapter,
    )
    from disha.functional import Geometry, register_method
    from disha.interop import inspect_adapter, load_adapter
    from disha.layers import (
        AdaptedLayer,
        BatLinear,
        BlockSpec,
        BoneLinear,
        register_layer_kind,
    )
    from disha.model.check import check_adapters
    from disha.model.check_report import CheckedWeight, CheckReport
    from disha.model.control import (
        adapters_active,
        adapters_disabled,
        route_adapters,
        set_active_adapters,
        set_adapter_scale,
    )
    from disha.model.inject import inject_adapters, plan_adapters
    from disha.model.many import adapter_groups, adapter_losses
    from disha.model.merge import merge_adapters, unmerge_adapters
    from disha.model.plan import Plan, Skipped
    from disha.model.rates import suggest_rate
    from disha.model.removal import remove_adapters
    from disha.model.state import LoadReport, adapter_state_dict, load_adapter_state_dict
    from disha.model.summary import Summary, summary
    from disha.model.training import adapter_parameters, mark_only_adapters_trainable

__all__ = [
    "AdaptedLayer",
    "AdapterFile",
    "AdapterFileError",
    "AdapterFileWarning",
    "AdapterIOError",
    "AdapterStateError",
    "ArgumentError",
    "ArgumentTypeError",
    "BatLinear",
    "BlockSpec",
    "BoneLinear",
    "CheckReport",
    "CheckedWeight",
    "ConversionError",
    "DishaError",
    "Geometry",
    "LoadReport",
    "MergeError",
    "MissingPackageError",
    "ModeError",
    "Plan",
    "Skipped",
    "Summary",
    "TargetError",
    "__version__",
    "adapter_groups",
    "adapter_losses",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters_active",
    "adapters_disabled",
    "check_adapters",
    "combine_adapters",
    "inject_adapters",
    "inspect_adapter",
    "load_adapter",
    "load_adapter_state_dict",
    "mark_only_adapters_trainable",
    "merge_adapters",
    "plan_adapters",
    "register_layer_kind",
    "register_method",
    "remove_adapters",
    "route_adapters",
    "save_adapter",
    "set_active_adapters",
    "set_adapter_scale",
    "suggest_rate",
    "summary",
    "unmerge_adapters",
]

MODULES_WITH_PUBLIC_NAMES = (
    "files",
    "functional",
    "interop",
    "layers",
    "model.check",
    "model.check_report",
    "model.control",
    "model.inject",
    "model.many",
    "model.merge",
    "model.plan",
    "model.rates",
    "model.removal",
    "model.state",
    "model.summary",
    "model.training",
)
"""They have all public names but those of errors. They import torch, which takes a second."""


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name: str) -> Any:
        """Import all public names when the first is used, or a subpackage such as `interop`."""
        if name in __all__:
            for module_name in MODULES_WITH_PUBLIC_NAMES:
                names_of_module = vars(import_module(f"disha.{module_name}"))
                for public_name in __all__:
                    if public_name in names_of_module:
                        globals()[public_name] = names_of_module[public_name]
            return globals()[name]
        try:
            return import_module(f"disha.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"disha.{name}":
                raise  # a package that the subpackage imports is missing
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error

    def __dir__() -> list[str]:
        return sorted([*__all__, "functional", "integrations", "interop"])
