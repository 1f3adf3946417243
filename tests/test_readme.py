"""The README's Python runs as written and prints what the README says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(
    r"```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", README.read_text(), re.DOTALL
)


def test_every_python_block_is_followed_by_its_output():
    assert len(EXAMPLES) == README.read_text().count("```python")
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_example(example, tmp_path, monkeypatch, capsys):
    code, output = EXAMPLES[example]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, f"README example {example + 1}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == output
