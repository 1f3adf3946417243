"""Take an adapter out of a model, and save it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from disha.checks import check_type
from disha.config import find_matching
from disha.errors import AdapterStateError
from disha.files.contents import write_contents
from disha.files.disk import PathLike, file_at, folder_for
from disha.files.header import AdapterContents
from disha.layers.fingerprints import fingerprint
from disha.layers.spec import BlockSpec
from disha.layers.weights import base_of, is_packed
from disha.model import buffers
from disha.model.found import ModelBlock
from disha.model.state import collect_tensors, is_finite_as
from disha.model.view import ModelView
from disha.sharding.tensors import gather
from disha.sharding.zero import gather_partition
from disha.text import counted, first_few, join


def save_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter, and nothing else of the model, to one safetensors file.

    The adapter is its blocks, the parameters of `also_train`, all others that require gradients (of
    which it warns), and the buffers that training has changed: the running statistics of norms and
    those that `also_train` names. An existing file stays until the new one is complete. The same
    adapter gives the same bytes, also from a wrapped, sharded or merged model.

    If `fully_shard` has sharded the model, call this on all ranks: they gather the adapter, and the
    first one writes the file. Otherwise, also under DDP, rank 0 is enough.

    Args:
        model: a model with adapters.
        path: the file to write. For a folder (it exists, or the path ends with a slash), the file
            is `adapter.safetensors` in it, and the folder is made if it does not exist.
        adapter: the adapter's name. The file does not contain it.
        metadata: your notes, str -> str.

    Raises:
        AdapterIOError: the file can't be written. An existing file is unchanged.
        AdapterStateError: the adapter holds values that are not finite, or has no values (on the
            meta device), or its blocks differ in method or r_out.
        ArgumentError: there is no such adapter.
        ArgumentTypeError: the metadata is not str -> str.

    Warns:
        UserWarning: parameters train, and so are saved, that `also_train` does not name; other
            buffers have changed since the injection, and are not saved; or the adapter has lost
            layers, because other modules have taken their place.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.save_adapter(model, f"{folder}/adapter.safetensors")
        ...     list(disha.inspect_adapter(folder).tensors)
        ['0.bone_block']
    """
    view = ModelView(model)
    ranks = view.ranks
    action = f"save adapter {adapter!r}"
    with ranks.fail_together(action):
        view.require(adapter)
        target = file_at(path)
    contents = adapter_contents(view, adapter, metadata)
    with ranks.fail_together(action):
        if ranks.writes:
            names_folder = Path(path) != target
            with folder_for(target.parent) if names_folder else nullcontext():
                write_contents(target, contents)
            _warn_of_differences(view, adapter)


def _warn_of_differences(view: ModelView, adapter: str) -> None:
    """Name what is in the file only because it trains, and what a user may miss in it."""
    trained = [
        parameter.name for parameter in view.list_trained(adapter) if parameter.claimant is None
    ]
    if trained:
        warnings.warn(
            f"the file of adapter {adapter!r} also holds {counted(len(trained), 'parameter')} that "
            f"also_train does not name, because they train: {first_few(trained, 3, ', ')}. To save "
            "without them, freeze them (mark_only_adapters_trainable)",
            stacklevel=3,
        )
    changed = buffers.list_unsaved(view)
    if changed:
        warnings.warn(
            f"the file of adapter {adapter!r} lacks {counted(len(changed), 'buffer')} of the model "
            f"that changed since the injection: {first_few(changed, 3, ', ')}. To save them, name "
            "them in also_train when you inject",
            stacklevel=3,
        )
    tied = _list_new_ties(view, adapter)
    if tied:
        warnings.warn(
            f"{counted(len(tied), 'weight')} of adapter {adapter!r} became tied after the "
            f"injection, to modules that do not read the update: {first_few(tied, 3, ', ')}. Tie "
            "first, and then inject",
            stacklevel=3,
        )
    lost = view.list_lost_layers(adapter)
    if lost:
        warnings.warn(
            f"the file of adapter {adapter!r} lacks {counted(len(lost), 'layer')} that it was "
            f"injected into: {first_few(lost, 3, ', ')}. Replacing a module, as "
            "resize_token_embeddings does, takes its block away; change the model first, and then "
            "inject",
            stacklevel=3,
        )


def _list_new_ties(view: ModelView, adapter: str) -> list[str]:
    """Return the adapted parameters that a module shares which neither adapts nor excludes them."""
    borrowers = view.find_borrowers()
    tied = []
    for model_block in view.blocks(adapter):
        spec = model_block.spec
        parameter = view.parameters_by_name.get(spec.full_name)
        readers = {*borrowers[model_block.block]}
        readers |= {join(name, spec.parameter) for name in view.names[model_block.layer]}
        for name in () if parameter is None else parameter.names:
            names = (name, name.removesuffix(".weight"))
            if name not in readers and not find_matching(model_block.block.config.exclude, names):
                tied.append(f"{spec.full_name} with {name}")
    return tied


def adapter_contents(
    view: ModelView,
    adapter: str = "default",
    metadata: Mapping[str, str] | None = None,
    *,
    with_fingerprints: bool = True,
) -> AdapterContents:
    """Return an adapter of a model, as a file would hold it; collective if the model is sharded.

    The tensors are gathered on the CPU, where they share memory with a model that is there too.
    Without fingerprints, the layers do not tell which base weights they belong to.
    """
    ranks = view.ranks
    action = f"take adapter {adapter!r} out of the model"
    with ranks.fail_together(action):
        notes = dict(metadata or {})
        for text in (*notes.keys(), *notes.values()):
            check_type("metadata", text, str, "a dict of str -> str")
        held = collect_tensors(view, adapter)
        meta = [key for key, tensor in held.items() if tensor.is_meta]
        if meta:
            raise AdapterStateError(
                f"adapter {adapter!r} is on the meta device ({meta[0]}); give the model values "
                "first"
            )
    tensors = {key: gather(tensor).detach().cpu() for key, tensor in held.items()}
    blocks = view.blocks(adapter)
    dropouts = sorted({model_block.block.config.dropout for model_block in blocks})
    if len(dropouts) > 1:  # of parts that were adapted one by one
        listed = " and ".join(map(str, dropouts))
        warnings.warn(
            f"the layers of adapter {adapter!r} have dropouts of {listed}, and a file holds one, "
            "that of the first; inject with one dropout",
            stacklevel=3,
        )
    borrowers = view.find_borrowers()
    layers = tuple(
        describe_block(
            model_block, borrowers[model_block.block], with_fingerprint=with_fingerprints
        )
        for model_block in blocks
    )
    with ranks.fail_together(action):
        _check_contents(adapter, layers, tensors)
    keys = {spec.key for spec in layers}
    return AdapterContents(
        config=blocks[0].block.config,
        layers=layers,
        also_train=tuple(sorted(tensors.keys() - keys)),
        tensors=tensors,
        metadata=notes,
    )


def describe_block(
    model_block: ModelBlock, tied: Iterable[str], *, with_fingerprint: bool
) -> BlockSpec:
    """Return what a file says about a block, perhaps without the fingerprint of its weight."""
    base = base_fingerprint(model_block) if with_fingerprint else None
    return model_block.spec.but(base=base, tied=tuple(tied))


def base_fingerprint(model_block: ModelBlock) -> str | None:
    """Return the fingerprint of an adapted weight's original, or None if it has none."""
    layer = model_block.layer
    spec = model_block.block.spec
    if spec.is_new_rows:  # new rows do not depend on the old ones
        return None
    # The values depend on how the weight is quantised, but the adapter fits it either way.
    if spec.quantized or is_packed(layer, spec.parameter):
        return None
    weight = gather_partition(base_of(layer, spec))
    return fingerprint(spec.layout.part(weight, spec.outputs))


def _check_contents(
    adapter: str, layers: Sequence[BlockSpec], tensors: Mapping[str, Tensor]
) -> None:
    """Raise unless a file can hold the adapter, and a model can load it again."""
    methods = {(spec.method, spec.r_out) for spec in layers if not spec.is_new_rows}
    if len(methods) > 1:
        raise AdapterStateError(
            f"adapter {adapter!r} has blocks of different methods or r_out, and a file holds one; "
            "give each method its own adapter"
        )
    broken = [key for key, tensor in tensors.items() if not is_finite_as(tensor, tensor.dtype)]
    if broken:
        raise AdapterStateError(
            f"adapter {adapter!r} holds values that are not finite (NaN or infinity) in "
            f"{first_few(broken, 5, ', ')}; go back to an earlier checkpoint"
        )
