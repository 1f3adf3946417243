"""What is tried with one hostile file, and what must hold whatever is in it.

Looked at, loaded into a plain model, over the adapter it was made from, in part, and as a state
dict, a file either loads or raises `DishaError`; in two seconds, with memory in proportion to its
size. What a refusal leaves is the same to the bit, and an accepted file has changed nothing but
the blocks that it describes and the parameters that it lists.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import disha
from disha.layers import AdaptedLayer, Block
from tests.fuzzing.crafting import Case
from tests.fuzzing.limits import Usage, limited
from tests.fuzzing.subject import adapted, bits, plain, state_of

__all__ = ["Bench", "Results"]

Results = dict[str, bool]
"""What was tried -> whether it was accepted."""

LONGEST_MESSAGE = 20_000
PART = "body|embed"
TOKENS = torch.arange(10).view(2, 5)


class Bench:
    """The models that files are tried on; each is used again as long as it is unchanged.

    Args:
        folder: where the files are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.usage = Usage()
        self._ready: dict[int | None, tuple[nn.Module, dict[str, Any]]] = {}

    def model(self, which: int | None) -> tuple[nn.Module, dict[str, Any]]:
        """Return the plain model (None) or one with an adapter, and its state."""
        if which not in self._ready:
            model = plain() if which is None else adapted(which)
            self._ready[which] = (model, state_of(model))
        return self._ready[which]

    def try_all(self, case: Case) -> Results:
        """Try everything with a file.

        Raises:
            AssertionError: something that must hold does not.
            Exception: whatever was raised that is no DishaError.
        """
        self.usage = Usage()
        path = self.folder / "hostile.safetensors"
        path.write_bytes(case.data)
        rng, size = case.random, len(case.data)
        results = {"inspect": self._attempt(size, lambda: looked_at(path))}
        if results["inspect"]:
            results["print"] = self._attempt(size, lambda: printed(path))
        results["load"] = self._load(case, path, None, {})
        results["load otherwise"] = self._load(case, path, None, otherwise(rng))
        replacing = {"replace": True, "also_train": rng.random() < 0.7}
        results["replace"] = self._load(case, path, case.which, replacing)
        results["state dict"] = self._load_state(case, size)
        if results["load"] and not results["inspect"]:
            raise AssertionError("loaded what inspect_adapter refuses")
        return results

    def _attempt(self, size: int, call: Callable[[], object]) -> bool:
        try:
            with limited(size, self.usage):
                call()
        except disha.DishaError as error:
            _check_message(str(error))
            return False
        return True

    def _load(self, case: Case, path: Path, which: int | None, options: dict[str, Any]) -> bool:
        model, before = self.model(which)
        accepted = self._attempt(len(case.data), lambda: disha.load_adapter(model, path, **options))
        if not accepted:
            _check_unchanged(model, before)
            return False
        del self._ready[which]
        said, tensors = told_by(case.data)
        _check_only_its_own(model, before, said, tensors, options)
        self._check_usable(model, options.get("adapter", "default"), case.random)
        return True

    def _load_state(self, case: Case, size: int) -> bool:
        rng = case.random
        model, before = self.model(case.which)
        own = disha.adapter_state_dict(model)
        state, strict = odd_state(rng, own, case.data), rng.random() < 0.5
        accepted = self._attempt(
            size, lambda: disha.load_adapter_state_dict(model, state, strict=strict)
        )
        if not accepted:
            _check_unchanged(model, before)
            return False
        del self._ready[case.which]
        _check_same_but(model, before, _ids(before, own))
        return True

    def _check_usable(self, model: nn.Module, adapter: str, rng: random.Random) -> None:
        with torch.no_grad():
            model(TOKENS)
        if rng.random() < 0.1:
            again = self.folder / "again.safetensors"
            disha.save_adapter(model, again, adapter)
            disha.load_adapter(plain(), again)
            copy.deepcopy(model)


def otherwise(rng: random.Random) -> dict[str, Any]:
    """Return options of load_adapter that are not the usual."""
    if rng.random() < 0.3:
        return {"layers": PART}
    dtype = rng.choice((None, torch.float16, torch.bfloat16))
    return {"adapter": "other", "also_train": rng.random() < 0.3, "dtype": dtype}


def looked_at(path: Path) -> disha.AdapterFile:
    """Look at a file."""
    described = disha.inspect_adapter(path)
    assert described.parameters >= 0
    assert all(record.nbytes >= 0 for record in described.tensors.values())
    assert pickle.loads(pickle.dumps(described.config)) == described.config
    return described


def printed(path: Path) -> None:
    """Print what a file says of itself."""
    _check_printable(str(disha.inspect_adapter(path)))


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file; early releases of safetensors can't load empty ones."""
    tensors = {}
    for name, fields in safetensors.deserialize(data):
        dtype = safetensors.torch._TYPES[fields["dtype"]]
        values = fields["data"]
        flat = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(fields["shape"])
    return tensors


def told_by(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of an accepted file, read without disha."""
    length = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + length])
    return json.loads(index["__metadata__"]["disha"]), tensors_in(data)


# --- what must hold ------------------------------------------------------------------------------


def _check_message(message: str) -> None:
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    _check_printable(message)


def _check_printable(text: str) -> None:
    """No file may move the cursor of whoever reads about it."""
    odd = next((c for c in text if not (c.isprintable() or c == "\n")), None)
    assert odd is None, f"prints {odd!r} as it is"


def _check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys(), "a refusal has changed what modules there are"
    for name, value in before.items():
        assert after[name] == value, f"a refusal has changed {name or 'the model'}"


def _ids(before: dict[str, Any], names: Mapping[str, Any]) -> set[int]:
    """Return the ids of named parameters."""
    found = set()
    for module, (*_, parameters, _, _) in before.items():
        for key, identity, _, _ in parameters:
            if f"{module}.{key}".lstrip(".") in names:
                found.add(identity)
    return found


def _check_same_but(model: nn.Module, before: dict[str, Any], changed: set[int]) -> None:
    """Every module, parameter and buffer of before is there, all bits but those of `changed`."""
    modules = dict(model.named_modules())
    for name, (identity, cls, training, _, parameters, buffers, _) in before.items():
        module = modules[name]
        assert id(module) == identity
        assert isinstance(module, getattr(cls, "original_class", cls))
        assert module.training == training
        for key, parameter, _, value in parameters:
            now = module._parameters[key]
            assert id(now) == parameter, f"{name}.{key} is another object"
            same = bits(now)[:2] == value[:2] if parameter in changed else bits(now) == value
            assert same, f"{name}.{key} has changed"
        if not isinstance(module, Block):  # whose buffer is its scale
            for key, value in buffers:
                assert bits(module._buffers[key]) == value, f"buffer {name}.{key} has changed"


def _check_only_its_own(
    model: nn.Module,
    before: dict[str, Any],
    said: dict[str, Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
) -> None:
    """Blocks and listed parameters are the file's, and everything else is what it was."""
    adapter = options.get("adapter", "default")
    expected: dict[int, tuple[str, Tensor]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in said["layers"]:
        if "layers" in options and not re.search(PART, layer["name"]):
            continue
        held = _block(model, layer["name"], adapter)
        key = f"{layer['name']}.{said['config'].get('method', 'bone')}_block".lstrip(".")
        expected[id(held.block)] = (key, tensors[key])
        assert held.scale == float(layer["scale"]), f"{key}: another scale"
    if options.get("also_train", True):
        for key in said["also_train"]:
            parameter = parameters[key]
            assert id(parameter) not in expected, f"{key} is loaded into twice"
            expected[id(parameter)] = (key, tensors[key])
    found = {id(parameter): parameter for parameter in model.parameters()}
    for identity, (key, tensor) in expected.items():
        assert torch.equal(found[identity], tensor.to(found[identity].dtype)), f"{key} is not its"
        assert found[identity].isfinite().all(), f"{key} is not finite"
    known = {parameter[1] for module in before.values() for parameter in module[4]}
    assert set(found) - known <= set(expected), "there are parameters that the file does not have"
    _check_same_but(model, before, set(expected))


def _block(model: nn.Module, name: str, adapter: str) -> Block:
    """Return the block of a layer, or of a weight that has its own name behind its layer's."""
    above, _, last = name.rpartition(".")
    layer, own = model.get_submodule(above), last
    if last in layer._modules or not name:
        layer, own = model.get_submodule(name), ""
    assert isinstance(layer, AdaptedLayer)
    return layer.disha.blocks()[adapter, own]


# --- state dicts ---------------------------------------------------------------------------------


def odd_state(rng: random.Random, own: Mapping[str, Tensor], data: bytes) -> dict[Any, Any]:
    """Return a state dict for an adapter: the file's tensors under its keys, and odd ones."""
    state: dict[Any, Any] = {key: value.clone() + 0.5 for key, value in own.items()}
    try:
        tensors = tensors_in(data)
    except Exception:  # whatever safetensors makes of it is not our concern here
        tensors = {}
    keys = list(state)
    if rng.random() < 0.5:
        state |= dict(zip(keys, list(tensors.values())[: len(keys)], strict=False))
    if rng.random() < 0.3:
        state |= tensors
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice(keys)
        state[rng.choice((key, key, f"module.{key}", f"_orig_mod.{key}", "head.weight", 5, ""))] = (
            _odd_tensor(rng, own[key])
        )
    if rng.random() < 0.2:
        state.pop(rng.choice(keys))
    return state


def _odd_tensor(rng: random.Random, like: Tensor) -> Any:
    return rng.choice(
        (
            lambda: like.clone() + 1,
            lambda: like.double() * 1e300 * 1e300,
            lambda: torch.full_like(like, float("nan")),
            lambda: torch.full(like.shape, 1e300, dtype=torch.float64),
            lambda: like.to(torch.int64),
            lambda: like.to(torch.complex64),
            lambda: like.to(torch.bool),
            lambda: like.float().to(torch.float8_e4m3fn),
            lambda: like.to_sparse(),
            lambda: like.to("meta"),
            lambda: torch.zeros(1).expand(like.shape),
            lambda: like.clone().requires_grad_(),
            lambda: nn.Parameter(like.clone()),
            lambda: like.flatten(),
            lambda: like[..., None],
            lambda: like.T if like.dim() == 2 else like[:0],
            lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([like, like]),
            lambda: like.tolist(),
            lambda: like.float().numpy(),
            lambda: rng.choice((None, 1.0, "tensor", b"", object, {}, [like])),
        )
    )()
