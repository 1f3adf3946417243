"""GRPO with vLLM inside: it answers as the trained model does, and the base stays as it is."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.finetune.tiny_models import write_model
from tests.serving.served import ENVIRONMENT, PYTHON

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("method", ["bone", "bat", "lora"])
def test_each_step_has_the_weights_of_the_trained_model(tmp_path, method):
    model = write_model(tmp_path / "model", "Llama")
    results = tmp_path / "results.json"
    words = [PYTHON, Path(__file__).with_name("in_trl.py"), model, method, results]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        list(map(os.fspath, words)), env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    found = json.loads(results.read_text())
    print(found)
    assert len(found["steps"]) == 3
    assert all(step["equal"] for step in found["steps"])
    assert max(step["error"] for step in found["steps"]) < 1e-5
    assert found["steps"][0]["effect"] == 0  # a new adapter is zero
    assert found["steps"][-1]["effect"] > 1e-2
    assert found["base_is_the_same"]
