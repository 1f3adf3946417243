"""Fuzz everything that reads bytes which a stranger may have written.

A reader loads its input, or raises a `DishaError` that names the file: no other exception, at most
`SECONDS` and `GROWTH` bytes. An input is JSON: what a file says, and the shapes of its tensors.
JSON is changed as a tree, so that most inputs come past `json.loads`; raw bytes are changed too.

`tests.fuzz` fuzzes for hours, and keeps the inputs that reached new code in `tests/corpus.xz`.
`replay` reads these in the tests, with others that are made of them.
"""

import atexit
import json
import lzma
import os
import random
import resource
import shutil
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import disha
from disha.files.contents import read_contents
from disha.files.header import HEADER_KEY, header_to_json, parse_header
from disha.files.loading import load_contents
from disha.finetune import notes
from disha.interop import image_lora, lora, peft, peft_reading
from disha.interop.checkpoints.matching import find_keys, find_misfits, what_is_known_of
from disha.interop.checkpoints.reading import open_checkpoint, ties_embeddings
from disha.interop.peft_format import PREFIX, PeftFolder
from disha.model.view import ModelView
from tests.adapter_files import every_kind
from tests.conftest import perturb

Json = Any
SECONDS = 1.0
"""How long a processor may work on an input, all of which have less than a megabyte."""
GROWTH = 200 * 2**20
"""By how many bytes the process may grow while it reads any number of inputs."""
CORPUS = Path(__file__).with_name("corpus.xz")
_IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
PLACE = Path(tempfile.mkdtemp(prefix="fuzzed-", dir=_IN_MEMORY))
_OWNER = os.getpid()


@atexit.register
def _remove_place() -> None:
    if os.getpid() == _OWNER:  # and not in a process that was forked from this one
        shutil.rmtree(PLACE, ignore_errors=True)


# --- inputs --------------------------------------------------------------------------------------

ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "0",
        "linear",
        "out in",
        "bone",
        "weight",
        ".",
        "\ud800",
    ),
    *("\x00", "\x1b[2J", "..", "/", "(a+)+$", "(.*)*x", "a" * 300, "{}", "[]", "null", "lora_A"),
    *([], [[]], {}, [{}], [0], [1], [[0, 4]], [[4, 0]], [[0, 10**12]], [None], [[0]], {"a": 1}),
    *({"": ""}, [[[[[[]]]]]], ["a", "a"], [0, 0], "x.lora_A.weight", "x.bone_block"),
)
"""Values that are put in the place of others."""


def shapes_of(tensors: Any) -> Json:
    """Return the shapes and dtypes of tensors as an input has them."""
    return {
        key: [str(one.dtype).removeprefix("torch."), list(one.shape)]
        for key, one in tensors.items()
    }


def tensors_of(shapes: Json) -> dict[str, torch.Tensor]:
    """Return tensors of the shapes in an input that a file could have, and that are small."""
    tensors = {}
    for key, entry in shapes.items() if isinstance(shapes, dict) else ():
        if not (isinstance(key, str) and isinstance(entry, list) and len(entry) == 2):
            continue
        name, sizes = entry
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(dtype, torch.dtype) or not isinstance(sizes, list) or len(sizes) > 5:
            continue
        if all(type(size) is int and 0 <= size <= 64 for size in sizes):
            tensors[key] = torch.zeros(sizes, dtype=dtype) if _count(sizes) < 10_000 else None
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _count(sizes: list[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def pick(value: Json, rng: random.Random) -> tuple[Any, Any, Json]:
    """Return a part of a value by chance, what holds it, and where."""
    holder, last, part = None, None, value
    while isinstance(part, (dict, list)) and part and (holder is None or rng.random() < 0.9):
        holder = part
        last = rng.choice([*part]) if isinstance(part, dict) else rng.randrange(len(part))
        part = part[last]
    return holder, last, part


def mutate(value: Json, rng: random.Random) -> Json:
    """Return a value with a few of its parts changed."""
    value = copied(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        holder, last, _ = pick(value, rng)
        if holder is not None:
            _change(holder, last, copied(pick(value, rng)[2]), rng)
    return value


def copied(value: Json) -> Json:
    return json.loads(json.dumps(value))


def _change(holder: Any, last: Any, other: Json, rng: random.Random) -> None:
    """Change one part: put another in its place, take it away, repeat it, or rename it."""
    kind = rng.randrange(7)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(last, other)
    elif kind == 1:
        holder[rng.choice([str(one) for one in ODD])] = holder.pop(last)
    elif kind == 2:
        holder[last] = other
    elif kind == 3:
        holder[last] = [holder[last]]
    elif kind == 4 and isinstance(holder[last], str) and holder[last]:
        text = holder[last]
        at = rng.randrange(len(text))
        holder[last] = (
            text[:at] + rng.choice(("", ".", "0", "weight", "\x00", text)) + text[at + 1 :]
        )
    elif kind == 5 and isinstance(holder[last], (int, float)):
        holder[last] += rng.choice((-1, 1, 2, 0.5, 2**40))
    else:
        holder[last] = copied(rng.choice(ODD))


def _vary(value: Json, rng: random.Random) -> Json:
    """Return a value or bytes with something changed."""
    if not isinstance(value, bytes):
        return mutate(value, rng)
    data = bytearray(value)
    for _ in range(rng.choice((1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice((len(data), rng.randrange(len(data) + 1)))])


# --- readers -------------------------------------------------------------------------------------


class Reader:
    """Reads an input as the library reads a file of its kind."""

    def seeds(self) -> list[Json]:
        """Return inputs that are read without an error."""
        raise NotImplementedError

    def read(self, value: Json) -> object:
        raise NotImplementedError


@cache
def adapters() -> list[disha.AdapterFile]:
    """Return adapters of every kind of layer and method."""
    found = []
    for number, settings in enumerate(
        (
            {"target_regex": "."},
            {"target_regex": "linear|attention", "method": "bat", "r": 2},
            {"target_regex": "linear", "r_out": 2},
            {"target_regex": "linear", "groups": 2, "r": 7},
            {"target_regex": "linear|conv", "method": "lora", "also_train": "embed"},
            {"target_regex": "linear", "rows": {"linear": [(0, 2), (4, 6)]}, "dropout": 0.5},
        )
    ):
        model = perturb(disha.inject_adapters(every_kind(), **{"r": 4, **settings}))
        path = PLACE / f"seed{number}"
        disha.save_adapter(model, path, metadata={"base": '{"bits": "4"}', "new_tokens": "[]"})
        found.append(read_contents(path))
    return found


def header_of(file: disha.AdapterFile) -> Json:
    return json.loads(header_to_json(file))


class Header(Reader):
    """An adapter file's header and tensors; what is read is printed, and loaded into its model."""

    path = PLACE / "header.safetensors"

    def __init__(self) -> None:
        self.path.touch()
        self.model = every_kind()

    def seeds(self) -> list[Json]:
        return [[header_of(file), shapes_of(file.tensors)] for file in adapters()]

    def read(self, value: Json) -> object:
        header, shapes = value if isinstance(value, list) and len(value) == 2 else (value, {})
        text = header if isinstance(header, str) else json.dumps(header)
        file = parse_header(self.path, text, tensors_of(shapes))
        str(file), header_to_json(file)
        [layer.to_json() for layer in file.layers]
        view = ModelView(self.model)
        try:
            load_contents(view, self.path, file, "fuzzed", replace=True, freeze=False)
        finally:
            if "fuzzed" in ModelView(self.model).adapters:
                disha.remove_adapters(self.model)
        return file


class Bytes(Reader):
    """The bytes of an adapter file, from the disk."""

    path = PLACE / "bytes.safetensors"

    def seeds(self) -> list[Json]:
        return [[header_of(file), shapes_of(file.tensors)] for file in adapters()]

    def read(self, value: Json) -> object:
        if isinstance(value, bytes):
            self.path.write_bytes(value)
        else:
            header, shapes = value if isinstance(value, list) and len(value) == 2 else (value, {})
            try:
                metadata = {HEADER_KEY: json.dumps(header)}
                safetensors.torch.save_file(tensors_of(shapes), self.path, metadata)
            except (safetensors.SafetensorError, ValueError):  # no file can hold it
                return None
        return str(disha.inspect_adapter(self.path))


class Peft(Reader):
    """The two files of a folder of PEFT: LoRA, MiSS or Bone."""

    path = PLACE / "peft"

    def seeds(self) -> list[Json]:
        model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(6, 4, 3), nn.Embedding(8, 6))
        found = []
        for number, (write, settings) in enumerate(
            (
                (lora.export, {"target_regex": "."}),
                (lora.export, {"target_regex": "0", "method": "lora", "also_train": "2"}),
                (peft.export, {"target_regex": "0"}),
                (peft.export, {"target_regex": "0", "method": "bat"}),
                (peft.export, {"target_regex": "0", "r_out": 2}),
            )
        ):
            disha.remove_adapters(model) if number else None
            write(disha.inject_adapters(model, r=2, **settings), PLACE / f"peft{number}")
            folder = peft_reading.read_peft_files(PLACE / f"peft{number}")
            found.append([dict(folder.fields), shapes_of(folder.tensors)])
        found[0][0] |= {"alpha_pattern": {"^0": 3}, "rank_pattern": {"0.*": 2}, "bias": "none"}
        found[1][0]["trainable_token_indices"] = {"0": [1, 2]}
        found[1][1]["0.token_adapter.trainable_tokens_delta"] = ["float32", [2, 6]]
        return found

    def read(self, value: Json) -> object:
        fields, shapes = value if isinstance(value, list) and len(value) == 2 else (value, {})
        self.path.mkdir(exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(fields))
        fields = peft.read_config(self.path)
        tensors = {key.removeprefix(PREFIX): one for key, one in tensors_of(shapes).items()}
        with peft_reading.explain_settings(self.path):
            folder = PeftFolder(self.path, fields, tensors)
            contents = peft_reading._contents_of(folder, what_is_known_of(None))
        header_to_json(contents)
        return contents


class Folder(Reader):
    """All files of a folder of PEFT, as the commands read them from the disk."""

    path = PLACE / "folder"

    def seeds(self) -> list[Json]:
        fields, shapes = Peft().seeds()[0]
        torch.save(tensors_of(shapes), PLACE / "old.bin")
        files = {
            "adapter_config.json": {**fields, "base_model_name_or_path": "x"},
            "tokenizer.json": {"added_tokens": [{"content": "<a>"}]},
            "chat_template.jinja": "{{ x }}",
            "adapter_model.bin": (PLACE / "old.bin").read_bytes().decode("latin-1"),
        }
        return [files, {"adapter_config.json": fields}]

    def read(self, value: Json) -> object:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        for name in self.names:
            if isinstance(value, dict) and name in value:
                held = value[name]
                text = held if isinstance(held, str) else json.dumps(held)
                (self.path / name).write_bytes(text.encode("latin-1", "replace"))
        notes.read_notes(self.path)
        notes.read_settings(self.path)
        return str(disha.inspect_adapter(self.path))

    names = (
        *("adapter_config.json", "tokenizer.json", "chat_template.jinja"),
        *("adapter_model.bin", "adapter_model.safetensors"),
    )


class Image(Reader):
    """A LoRA of an image model, as `diffusers` or kohya's programs write it."""

    path = PLACE / "image.safetensors"
    modules = {"unet": ["conv_in", "down.0"], "text_encoder": ["encoder.layers.0.q_proj"]}  # noqa: RUF012

    def seeds(self) -> list[Json]:
        unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3), "mid": nn.Linear(4, 4)})
        disha.inject_adapters(unet, ".", r=2)
        image_lora.export({"unet": unet}, self.path)
        tensors = shapes_of(safetensors.torch.load_file(self.path))
        kohya = {
            "lora_unet_down_0.lora_down.weight": ["float32", [2, 8]],
            "lora_unet_down_0.lora_up.weight": ["float32", [8, 2]],
            "lora_unet_down_0.alpha": ["float32", []],
        }
        settings = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
        return [[{}, tensors], [settings, tensors], [{}, kohya]]

    def read(self, value: Json) -> object:
        metadata, shapes = value if isinstance(value, list) and len(value) == 2 else ({}, value)
        metadata = metadata if isinstance(metadata, dict) else {}
        held = {
            key: text if isinstance(text, str) else json.dumps(text)
            for key, text in metadata.items()
        }
        tensors = tensors_of(shapes)
        before, image_lora.read_tensors = image_lora.read_tensors, lambda path: (tensors, held)
        try:
            return [image_lora.read_file(self.path, modules) for modules in ({}, self.modules)]
        finally:
            image_lora.read_tensors = before


class Checkpoint(Reader):
    """A base: its index and its configuration, beside an adapter."""

    path = PLACE / "base"

    def seeds(self) -> list[Json]:
        self.path.mkdir(exist_ok=True)
        safetensors.torch.save_file(
            {"linear.weight": torch.zeros(6, 14)}, self.path / "a.safetensors"
        )
        index = {"metadata": {"total_size": 1}, "weight_map": {"linear.weight": "a.safetensors"}}
        config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 14}
        experts = {f"m.mlp.experts.{n}.{w}.weight": "a.safetensors" for n in (0, 1) for w in "gud"}
        return [[index, config], [{"weight_map": experts}, {"text_config": config}]]

    def read(self, value: Json) -> object:
        index, config = value if isinstance(value, list) and len(value) == 2 else (value, {})
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.path / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(self.path)
        ties_embeddings(checkpoint.config())
        contents = adapters()[2]
        keys = find_keys(checkpoint, contents)
        return find_misfits(checkpoint, contents, keys)


class Notes(Reader):
    """What an adapter notes for the commands."""

    path = PLACE / "notes.safetensors"

    def seeds(self) -> list[Json]:
        base = {"base_model_name_or_path": "x", "bits": "4"}
        return [
            {"base": base, "new_tokens": ["<a>"], "prompt": "chat", "eos_token": "</s>"},
            {"base": json.dumps(base), "new_tokens": "[]", "chat_template": "{{ x }}"},
        ]

    def read(self, value: Json) -> object:
        value = value if isinstance(value, dict) else {}
        held = {
            key: text if isinstance(text, str) else json.dumps(text) for key, text in value.items()
        }
        notes.read_noted_bits(held)
        with suppress(disha.ArgumentError):
            notes.read_noted_base(self.path, held)
        return notes.read_noted_tokens(held)


@cache
def readers() -> dict[str, Reader]:
    made = (Header(), Bytes(), Peft(), Folder(), Image(), Checkpoint(), Notes())
    return {type(reader).__name__.lower(): reader for reader in made}


# --- one input -----------------------------------------------------------------------------------


def to_bytes(value: Json) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def from_bytes(data: bytes) -> Json:
    """Return the input in bytes: a value, or themselves if they are no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data


def check(reader: Reader, value: Json) -> str | None:
    """Read an input, and return what is wrong with how it was read, or None."""
    if isinstance(value, bytes) and not isinstance(reader, Bytes):
        value = value.decode("latin-1")
    start = time.process_time()
    wrong = None
    try:
        with warnings.catch_warnings(action="ignore"):
            reader.read(value)
    except disha.DishaError as error:
        name = getattr(reader, "path", PLACE).name
        if name not in str(error) and not isinstance(reader, Notes):
            wrong = f"the error does not name {name}: {error}"
    except Exception as error:
        trace = error.__traceback__
        where = "?"
        while trace is not None:  # the last line of this library that is in the way
            file = Path(trace.tb_frame.f_code.co_filename)
            if "disha" in file.parts or file.parent == Path(__file__).parent:
                where = f"{file.name}:{trace.tb_lineno}"
            trace = trace.tb_next
        wrong = f"{type(error).__name__} at {where}: {error}"
    took = time.process_time() - start
    if took > SECONDS:
        wrong = f"took {took:.1f} s"
    return wrong


def corpus_of(reader: str) -> list[bytes]:
    """Return the inputs that a reader takes without an error, and those that are kept."""
    return [*map(to_bytes, readers()[reader].seeds()), *load_corpus().get(reader, ())]


def replay(reader: str, seconds: float, seed: int = 0) -> tuple[int, dict[str, bytes]]:
    """Read the corpus, and inputs made of it by chance; return how many, and what went wrong."""
    rng = random.Random(seed)
    corpus = [from_bytes(data) for data in corpus_of(reader)]
    wrong: dict[str, bytes] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    end = time.monotonic() + seconds
    count = 0
    while count < len(corpus) or time.monotonic() < end:
        value = corpus[count] if count < len(corpus) else _vary(rng.choice(corpus), rng)
        count += 1
        said = check(readers()[reader], value)
        if said is not None:
            wrong.setdefault(said.partition(": ")[0], to_bytes(value))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > GROWTH:
        wrong[f"the process has grown by {grown} bytes"] = b""
    return count, wrong


# --- the corpus ----------------------------------------------------------------------------------


def load_corpus() -> dict[str, list[bytes]]:
    """Return the kept inputs of each reader."""
    if not CORPUS.exists():
        return {}
    held = json.loads(lzma.decompress(CORPUS.read_bytes()))
    return {reader: [text.encode("latin-1") for text in texts] for reader, texts in held.items()}


def save_corpus(corpus: dict[str, list[bytes]]) -> None:
    held = {
        reader: sorted({one.decode("latin-1") for one in inputs})
        for reader, inputs in corpus.items()
    }
    CORPUS.write_bytes(lzma.compress(json.dumps(held).encode(), preset=9))
