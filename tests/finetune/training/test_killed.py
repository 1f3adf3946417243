"""Training that is killed again and again comes to the same end, bit for bit."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.finetune.training import killed
from tests.processes import FORKED

KILLS = 20
PAUSE = 0.01
"""Seconds in every step, as many as a save takes: a kill hits either."""


def results(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        "adapter": (folder / "adapter.safetensors").read_bytes(),
        "losses": json.loads((folder / "losses.json").read_text()),
        "metrics": [(line["step"], line["loss"], line["tokens"]) for line in lines],
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    killed.train(folder)
    return results(folder)


def test_killed_at_random_moments_training_comes_to_the_same_end(tmp_path, straight):
    moments = random.Random(0)
    kills = 0
    while not (tmp_path / "adapter.safetensors").exists():
        started = FORKED.Event()
        process = FORKED.Process(target=killed.train, args=(tmp_path, PAUSE, started))
        process.start()
        if kills < KILLS:
            assert started.wait(60)
            time.sleep(moments.uniform(0, 4 * PAUSE))
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode == (0 if (tmp_path / "adapter.safetensors").exists() else -9)
    assert kills == KILLS
    assert results(tmp_path) == straight
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        *("adapter.safetensors", "checkpoint-88", "checkpoint-90", "losses.json", "metrics.jsonl")
    ]


def test_straight_training_is_the_same_every_time(tmp_path, straight):
    killed.train(tmp_path)
    assert results(tmp_path) == straight
