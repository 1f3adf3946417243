"""Fail or kill each writer at each of its file operations, and read what stands.

`python -m tests.faults` prints for each writer how many operations it has, and what was found after
a fault at each. A fault is an error of the operating system, or the death of the process. What
counts as an operation is what Python tells an audit hook (a file is opened, a folder made, a file
renamed, removed ...), each flush to the disk, and each write of tensors, half of which is then on
the disk.
"""

import argparse
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import disha
from disha.cli import main
from disha.files import disk
from disha.finetune.notes import TEMPLATE_KEY
from disha.interop import checkpoints, image_lora, lora, peft
from disha.interop.checkpoints import merging

FORK = multiprocessing.get_context("fork")
OPERATIONS = ("open", "os.", "fcntl.flock", "ctypes.dlsym", "tempfile.")
NOT_OF_FILES = ("os.fork", "os.listxattr", "os.getxattr", "os.putenv", "os.unsetenv", "os.exec")
ERROR = OSError(errno.EIO, "a fault")


# --- faults --------------------------------------------------------------------------------------


@dataclass
class Faults:
    """Counts the operations of this process, and lets one of them fail, or kills it there."""

    at: int
    kills: bool
    count: int = 0
    is_on: bool = True

    def step(self) -> bool:
        """Count an operation, and return whether it is the one that fails."""
        if not self.is_on:
            return False
        self.count += 1
        return self.count == self.at

    def fail(self) -> None:
        """Kill this process, or raise what an operation raises."""
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(*ERROR.args)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Count an operation of which Python tells."""
        if event.startswith(OPERATIONS) and not event.startswith(NOT_OF_FILES) and self.step():
            self.fail()

    def flush(self, descriptor: int) -> None:
        """Count a flush to the disk."""
        if self.step():
            self.fail()

    def write_half(self, tensors: Any, path: Path, *metadata: Any) -> None:
        """Write a safetensors file; of one that fails, only a part comes to the disk."""
        self.is_on, was_on = False, self.is_on
        safetensors.torch.save_file(tensors, path, *metadata)
        self.is_on = was_on
        if self.step():
            os.truncate(path, Path(path).stat().st_size // 2)
            self.fail()

    def install(self) -> None:
        """Let them act in this process, for good."""
        os.fsync = self.flush
        disk.save_file = merging.save_file = self.write_half
        sys.addaudithook(self.audit)


def attempt(write: Callable[[], object], faults: Faults) -> str:
    """Write with faults, and return what came of it."""
    faults.is_on = True
    try:
        write()
    except disha.DishaError:
        return "DishaError"
    except BaseException as error:
        return repr(error)
    finally:
        faults.is_on = False
    return "done"


@dataclass
class Found:
    """What was found after faults at each operation of a writer."""

    operations: int = 0
    raised: Counter[str] = field(default_factory=Counter)
    standing: Counter[str] = field(default_factory=Counter)  # "old", "new", or what else
    after_next: Counter[str] = field(default_factory=Counter)  # of the next save, which is whole
    drafts: int = 0  # after the next save

    def __str__(self) -> str:
        after = f"after the next save {dict(self.after_next)} and {self.drafts} drafts"
        return f"{self.operations}: {dict(self.raised)}; then {dict(self.standing)}; {after}"


def fail_everywhere(writer: "Writer", folder: Path) -> Found:
    """Let each operation of a writer fail, where it replaces old by new."""

    def in_child() -> None:
        faults = Faults(0, kills=False, is_on=False)
        faults.install()
        found = Found()
        while True:
            renew(writer, folder)
            faults.at, faults.count = found.operations + 1, 0
            said = attempt(lambda: writer.write(folder, "new"), faults)
            if faults.count < faults.at:
                there.send(found)
                return
            note(found, writer, folder, said)

    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=in_child)
    process.start()
    there.close()
    found: Found = here.recv()
    process.join()
    return found


def kill_everywhere(writer: "Writer", folder: Path) -> Found:
    """Kill a writer at each of its operations, where it replaces old by new."""

    def in_child(at: int) -> None:
        faults = Faults(at, kills=True, is_on=False)
        faults.install()
        said = attempt(lambda: writer.write(folder, "new"), faults)
        os._exit(said != "done")

    found = Found()
    while True:
        renew(writer, folder)
        process = FORK.Process(target=in_child, args=(found.operations + 1,))
        process.start()
        process.join()
        if process.exitcode == 0:
            return found
        assert process.exitcode == -signal.SIGKILL
        note(found, writer, folder, "killed")


def renew(writer: "Writer", folder: Path) -> None:
    """Let the folder hold the old version, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer.write(folder, "old")


def note(found: Found, writer: "Writer", folder: Path, said: str) -> None:
    """Note what stands after a fault, and what the next save makes of it."""
    found.operations += 1
    found.raised[said] += 1
    found.standing[writer.state(folder)] += 1
    writer.write(folder, "new")
    found.after_next[writer.state(folder)] += 1
    found.drafts += sum(1 for _ in folder.rglob(".*.tmp"))


# --- writers -------------------------------------------------------------------------------------

VALUES = {"old": 1.0, "new": 2.0}


def model_of(version: str, **settings: Any) -> nn.Module:
    """Return a model whose adapter has one value in all blocks."""
    model = disha.inject_adapters(base_model(), "proj", r=4, **settings)
    for block in disha.adapter_parameters(model):
        block.data.fill_(VALUES[version])
    return model


def base_model() -> nn.Module:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False), "v_proj": nn.Linear(8, 8)})
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def value_in(path: Path, key: str = "") -> str:
    """Return the version of a safetensors file: all tensors (with this in the name) agree on it."""
    values = set()
    for name, tensor in safetensors.torch.load_file(path).items():
        if key in name:
            values.update(tensor.unique().tolist())
    versions = [version for version, value in VALUES.items() if {value} == values - {0.0}]
    return versions[0] if versions else f"values {sorted(values)}"


def agree(*versions: str) -> str:
    """Return the version of files that belong together."""
    return versions[0] if len({*versions}) == 1 else " beside ".join(versions)


def run(*words: object) -> None:
    """Run a command of disha, in silence; raise the line that it complains with."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as complaint:
        code = main([str(word) for word in words])
    if code:
        raise disha.DishaError(complaint.getvalue())


class Writer:
    """Writes a version of its result into a folder, and tells the version that is there."""

    name = ""

    def write(self, folder: Path, version: str) -> None:
        raise NotImplementedError

    def state(self, folder: Path) -> str:
        raise NotImplementedError


class AdapterFile(Writer):
    name = "save_adapter"

    def write(self, folder, version):
        disha.save_adapter(model_of(version), folder / "adapter.safetensors")

    def state(self, folder):
        disha.inspect_adapter(folder / "adapter.safetensors")
        return value_in(folder / "adapter.safetensors")


class NewFolder(AdapterFile):
    name = "save_adapter, into a folder"

    def write(self, folder, version):
        if version == "new":
            disha.save_adapter(model_of(version), f"{folder}/run/1/")

    def state(self, folder):
        if not (folder / "run" / "1" / "adapter.safetensors").exists():
            return "old"
        return super().state(folder / "run" / "1")


class Peft(Writer):
    """Two files, each replaced on its own: the blocks, and the configuration with the dropout."""

    name = "peft.export"
    key = ""
    dropouts = {"old": 0.25, "new": 0.5}  # noqa: RUF012
    field = "miss_dropout"

    def write(self, folder, version):
        peft.export(model_of(version, dropout=self.dropouts[version]), folder / "out")

    def state(self, folder):
        out = folder / "out"
        dropout = json.loads((out / "adapter_config.json").read_text())[self.field]
        [of_config] = [version for version, value in self.dropouts.items() if value == dropout]
        return agree(value_in(out / "adapter_model.safetensors", self.key), of_config)


class NewPeft(Peft):
    name = "peft.export, into a new folder"

    def write(self, folder, version):
        if version == "new":
            super().write(folder, version)

    def state(self, folder):
        if not (folder / "out" / "adapter_config.json").exists():
            return "old"
        return super().state(folder)


class Lora(Peft):
    name = "lora.export"
    field = "lora_dropout"
    key = "lora_B"

    def write(self, folder, version):
        lora.export(model_of(version, dropout=self.dropouts[version]), folder / "out")


class ImageLora(Writer):
    name = "image_lora.export"

    def write(self, folder, version):
        image_lora.export({"unet": model_of(version)}, folder / "lora.safetensors")

    def state(self, folder):
        return value_in(folder / "lora.safetensors", "lora_B")


class Merged(Writer):
    """A folder with two shards and a configuration, which is replaced as a whole."""

    name = "merge_into_checkpoint"
    out = "merged"

    def write(self, folder, version):
        base, adapter = folder / "base", folder / f"{version}.adapter"
        if not base.exists():
            base.mkdir()
            names = {}
            for name, weight in base_model().state_dict().items():
                names[name] = f"{name}.safetensors"
                safetensors.torch.save_file({name: weight}, base / names[name])
            (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
            for each in VALUES:
                disha.save_adapter(model_of(each), folder / f"{each}.adapter")
        self.merge(base, adapter, folder / self.out)

    def merge(self, base, adapter, out):
        checkpoints.merge_into_checkpoint(base, adapter, out, overwrite=True)

    def state(self, folder):
        out = folder / self.out
        if out.is_file():
            return value_in(out)
        if {path.name for path in out.iterdir()} != {
            path.name for path in (folder / "base").iterdir()
        }:
            return "a part"
        return agree(*(value_in(out / f"{name}_proj.weight.safetensors") for name in "qv"))


class MergedFile(Merged):
    name = "merge_into_checkpoint, into a file"
    out = "merged.safetensors"


class MergeCommand(Merged):
    name = "disha merge"

    def merge(self, base, adapter, out):
        run("merge", base, adapter, out, "--overwrite")


class ConvertCommand(Writer):
    name = "disha convert"

    def write(self, folder, version):
        for each in VALUES:
            if not (folder / f"{each}.adapter").exists():
                notes = {TEMPLATE_KEY: each}
                disha.save_adapter(model_of(each), folder / f"{each}.adapter", metadata=notes)
        out = folder / "out.safetensors"
        run("convert", folder / f"{version}.adapter", out, "--to", "disha", "--overwrite")

    def state(self, folder):
        path = folder / "out.safetensors"
        return agree(value_in(path), disha.inspect_adapter(path).metadata[TEMPLATE_KEY])


class Text(Writer):
    """A report, a card, a template, a plot: each is one text or one picture of its own."""

    name = "a report, a card, a curve"

    def write(self, folder, version):
        disha.files.save(folder / "README.md", lambda new: new.write_text(version * 10_000))

    def state(self, folder):
        text = (folder / "README.md").read_text()
        return text[:3] if text == text[:3] * 10_000 else "a part"


WRITERS = (
    *(AdapterFile(), NewFolder(), Peft(), NewPeft(), Lora(), ImageLora()),
    *(Merged(), MergedFile(), MergeCommand(), ConvertCommand(), Text()),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="writers whose names have one of these")
    words = parser.parse_args().words
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for writer in WRITERS:
            if words and not any(word in writer.name for word in words):
                continue
            files = Path(temporary, "files")
            print(f"{writer.name}: failed at each of {fail_everywhere(writer, files)}", flush=True)
            print(f"{writer.name}: killed at each of {kill_everywhere(writer, files)}", flush=True)
