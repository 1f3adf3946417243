"""Modules of vLLM and SGLang from their sources, without what they depend on.

Both import kernels, servers and dozens of packages. So only the modules that are named here come
from the sources, whole and unchanged; in place of every other module of both packages stands an
empty one, whose attributes are empty classes. Code that would need one of these fails, or returns
nothing, so a check can't pass because of them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REAL = (
    "vllm.config.lora",
    "vllm.lora.lora_model",
    "vllm.lora.lora_weights",
    "vllm.lora.model_manager",
    "vllm.lora.peft_helper",
    "vllm.lora.utils",
    "vllm.model_executor.models.gpt_oss",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.models.utils",
    "sglang.srt.layers.utils",
    "sglang.srt.layers.utils.common",
    "sglang.srt.layers.utils.cp_utils",
    "sglang.srt.layers.utils.multi_platform",
    "sglang.srt.lora.layers",
    "sglang.srt.lora.lora",
    "sglang.srt.lora.lora_config",
    "sglang.srt.lora.mem_pool",
    "sglang.srt.lora.utils",
)
"""The modules that come from the sources."""


class _Empty(type):
    """The class of stand-ins: their attributes are stand-ins too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {"__module__": cls.__module__})

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        # A decorator gives back what it decorates.
        if len(arguments) == 1 and not named and isinstance(arguments[0], (type, _FUNCTION)):
            return arguments[0]
        return cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())  # not item after item, without end


_FUNCTION = types.FunctionType


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of vLLM and SGLang: the real ones in a folder, and stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ("vllm", "sglang"):
            return None
        if name not in REAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        file = self.folder.joinpath(*name.split("."))
        package = file / "__init__.py"
        file = package if package.exists() else file.with_suffix(".py")
        places = [str(file.parent)] if package.exists() else None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave a stand-in empty."""


def from_sources(folder: Path, name: str) -> Any:
    """Return a module of vLLM or SGLang; `folder` has their sources."""
    assert name in REAL
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(folder))
    return importlib.import_module(name)
