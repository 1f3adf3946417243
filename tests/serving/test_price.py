"""What an adapter path costs a token in vLLM: `python -m tests.serving -k price`."""

import re
import subprocess
from pathlib import Path

from tests.serving.served import ENVIRONMENT, PYTHON, ROOT


def test_an_adapter_costs_more_than_the_base(tmp_path):
    words = [str(PYTHON), str(Path(__file__).with_name("price.py")), str(tmp_path)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = re.findall(r"^\d+ at once, .*$", run.stdout, re.MULTILINE)
    print(*lines, sep="\n")
    ratios = [float(re.search(r": ([\d.]+) ", line)[1]) for line in lines]
    assert all(adapter > base for base, adapter in zip(ratios[::2], ratios[1::2], strict=True))
    assert len(ratios) == 4
