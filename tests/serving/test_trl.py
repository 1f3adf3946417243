"""GRPO with vLLM inside: it answers as the trained model does, and the base stays as it is."""

import re
import subprocess

import pytest

from tests.docs.test_examples import FOLDER, MEAN_REWARD
from tests.finetune.tiny_models import write_model
from tests.serving.served import ENVIRONMENT, PYTHON, ROOT, check_steps, train_with_vllm


@pytest.mark.parametrize("method", ["bone", "bat", "lora"])
def test_each_step_has_the_weights_of_the_trained_model(tmp_path, method):
    asked = {"model": str(write_model(tmp_path / "model", "Llama")), "method": method}
    weights = train_with_vllm(tmp_path / "weights", **asked, sent="weights")
    check_steps(weights)
    adapter = train_with_vllm(tmp_path / "adapter", **asked, sent="adapter")
    if method == "bat":
        assert "the adapter is no LoRA: a bat update is cut to a rank" in adapter
        return
    check_steps(adapter)
    for of_weights, of_adapter in zip(weights["steps"], adapter["steps"], strict=True):
        assert of_weights["rollouts"] == of_adapter["rollouts"]


def test_the_reward_of_the_example_rises(tmp_path):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    words = [str(PYTHON), str(FOLDER / "grpo.py")]
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-4000:]
    first, last = re.search(MEAN_REWARD, run.stdout).groups()
    assert float(last) > float(first) + 0.3
