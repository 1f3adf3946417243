"""The tokenizer in a model folder: ``tokenizer.json`` and the settings in the files beside it.

``tokenizer.json`` is used as it is, because the model was trained with it. Its own post-processor
decides whether a begin token comes before every text. ``add_bos_token`` in
``tokenizer_config.json`` is for older tokenizers and is ignored, as in transformers. The
configuration adds one thing: with ``"legacy": false``, a Llama tokenizer puts a space before the
first text only, not before each text that follows a special token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disha.files import read_json, read_text
from disha.finetune.errors import TokenizerError, raised_as
from disha.finetune.text.bounds import require_bounded
from disha.finetune.text.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["TOKENIZER_FILE", "begin_of", "open_tokenizer"]

TOKENIZER_FILE = "tokenizer.json"

LARGEST_TOKENIZER, MOST_ITEMS = 64 * 2**20, 2_000_000
"""Largest size of a tokenizer.json in bytes, and most items. A vocabulary of 262,000 tokens takes
33 MB and 1,300,000 items."""

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def open_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a model.

    Args:
        path: a ``tokenizer.json``, or the folder that holds it. If the folder also has
            ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``,
            ``config.json`` or ``chat_template.jinja``, they are read too.

    Raises:
        TokenizerError: a file is missing or damaged, or no file says which token ends a text.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    backend = _backend(file)
    folder = file.parent
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    model = _json(folder / "config.json")
    generation = _json(folder / "generation_config.json")
    if _puts_space_first_only(config, model):
        _put_space_first_only(backend)
    named = dict(_named(config))
    ends = list(_ends(backend, named, generation, model))
    if not ends:
        raise TokenizerError(
            f"no file beside {file} says which token ends a text; name it as eos_token in "
            "tokenizer_config.json"
        )
    return Tokenizer(
        backend,
        ends[0],
        begin_of(backend),
        ends=frozenset(ends),
        chat_template=_chat_template(folder, config),
        named=named,
        source=folder,
    )


def begin_of(backend: BackendTokenizer) -> tuple[int, ...]:
    """Return the token ids that a tokenizer's post-processor puts before every text."""
    backend.encode_special_tokens = False
    bare = backend.encode("a", add_special_tokens=False).ids
    processed = backend.encode("a").ids
    places = range(len(processed) - len(bare) + 1)
    before = next((p for p in places if processed[p : p + len(bare)] == bare), 0)
    return tuple(processed[:before])


def _backend(file: Path) -> BackendTokenizer:
    from tokenizers import Tokenizer as BackendTokenizer

    if not file.exists():
        raise TokenizerError(
            f"there is no tokenizer at {file}; a {TOKENIZER_FILE} is needed, as "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it"
        )
    with raised_as(TokenizerError):
        content = read_text(file, LARGEST_TOKENIZER)
    if content.count(",") > MOST_ITEMS:
        raise TokenizerError(
            f"{file} lists more than {MOST_ITEMS:,} items; no tokenizer needs them"
        )
    try:
        backend = BackendTokenizer.from_str(content)
    except Exception as error:  # the package raises bare Exception for what it can't read
        raise TokenizerError(f"{file} can't be read as a tokenizer: {error}") from error
    # The file can ask to cut texts, or to pad them to any length.
    backend.no_truncation()
    backend.no_padding()
    require_bounded(backend, file)
    return backend


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    with raised_as(TokenizerError):
        return read_json(file)


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield special tokens by name. A token is a text, or an object with its `content`."""
    for name, token in config.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            yield name, content


def _ends(
    backend: BackendTokenizer,
    named: Mapping[str, str],
    generation: Mapping[str, Any],
    model: Mapping[str, Any],
) -> Iterator[int]:
    """Yield the ids that end a text, the tokenizer's own first. Training appends the first one."""
    own = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    if own is not None:
        yield own
    for told in (generation.get("eos_token_id"), model.get("eos_token_id")):
        ids = told if isinstance(told, list) else [told]
        yield from (index for index in ids if type(index) is int and index >= 0)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        with raised_as(TokenizerError):
            return read_text(file)
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        templates = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'} has a damaged chat_template: a text is expected, "
            "or a list of objects with name and template"
        ) from error
    if not isinstance(templates.get("default"), str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'} has no chat template named default, only "
            f"{', '.join(sorted(map(str, templates)))}; name one of them default"
        )
    return str(templates["default"])


def _puts_space_first_only(config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Return whether the folder holds a newer Llama tokenizer.

    Mistral's files name the same class, but their tokenizers are used as they are.
    """
    return (
        config.get("tokenizer_class") in LLAMA_CLASSES
        and config.get("legacy") is False
        and not str(model.get("model_type", "")).startswith("mistral")
    )


def _put_space_first_only(backend: BackendTokenizer) -> None:
    from tokenizers import normalizers, pre_tokenizers

    if isinstance(backend.normalizer, normalizers.Sequence) and backend.pre_tokenizer is None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
