from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from disha.finetune.base_model import open_base_model
from disha.finetune.errors import CheckpointError
from disha.finetune.models.hub_cache import located, name_in_cache
from disha.finetune.noted_base import noted_base
from disha.finetune.settings import ModelSettings
from tests.finetune import tiny_checkpoints

NAME = "some-org/Tiny_1.0"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def downloaded(cache: Path, name: str, folder: Path) -> Path:
    """Put a folder into a cache, as huggingface_hub does; return the entry."""
    entry = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = entry / "snapshots" / COMMIT, entry / "blobs"
    for new in (snapshot, blobs, entry / "refs"):
        new.mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"etag{number}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"etag{number}", snapshot))
    return entry


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", [NAME, "gpt2"])
def test_a_name_is_looked_up_where_huggingface_hub_does(cache, tiny_folder, name):
    downloaded(cache, name, tiny_folder("llama3"))
    expected = huggingface_hub.snapshot_download(name, cache_dir=cache, local_files_only=True)
    assert located(Path(name)) == Path(expected)
    assert name_in_cache(Path(expected)) == name


def test_the_environment_names_the_cache(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    for name, value, inside in (
        ("XDG_CACHE_HOME", "xdg", "huggingface/hub"),
        ("HF_HOME", "home", "hub"),
        ("HF_HUB_CACHE", "hub", ""),
    ):
        monkeypatch.setenv(name, str(tmp_path / value))
        entry = downloaded(tmp_path / value / inside, NAME, tiny_folder("llama3"))
        assert located(Path(NAME)) == entry / "snapshots" / COMMIT


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_the_command_takes_the_name(finetune, cache, tiny_folder, family):
    downloaded(cache, NAME, tiny_folder(family))
    report = finetune.good("--merge", base_model_name_or_path=NAME, max_steps=2)
    assert report["model"] == NAME
    adapter = finetune.output / "adapter.safetensors"
    assert noted_base(adapter).base_model_name_or_path == Path(NAME)
    again = finetune.output.with_name("again")
    assert finetune.other("merge", adapter, again).code == 0
    for merged in (again, finetune.output / "merged"):
        assert {file.name for file in merged.iterdir()} == {
            file.name for file in tiny_folder(family).iterdir()
        }


def test_what_exists_is_no_name(cache, tiny_folder, tmp_path, monkeypatch):
    downloaded(cache, NAME, tiny_folder("llama3"))
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert located(Path(NAME)) == Path(NAME)
    for other in ("../x", "a/b/c", "/a/b", "a b/c", "-a/.."):
        assert located(Path(other)) == Path(other)


def test_what_is_not_in_the_cache_can_be_downloaded(finetune, cache):
    done = finetune(base_model_name_or_path=NAME)
    assert done.code == 2
    assert f"run: hf download {NAME}" in done.complaint


def no_reference(entry):
    (entry / "refs" / "main").unlink()


def no_snapshot(entry):
    shutil.rmtree(entry / "snapshots")


def no_config(entry):
    (entry / "snapshots" / COMMIT / "config.json").unlink()


def outside(entry):
    (entry / "refs" / "main").write_text("../../../../somewhere")


def unfinished(entry):
    (entry / "blobs" / "etag9.1a2b3c4d.incomplete").touch()


@pytest.mark.parametrize("damage", [no_reference, no_snapshot, no_config, outside, unfinished])
def test_a_download_that_is_not_complete_is_refused(finetune, cache, tiny_folder, damage):
    damage(downloaded(cache, NAME, tiny_folder("llama3")))
    done = finetune(base_model_name_or_path=NAME)
    assert done.code == 2
    assert f"is not complete; to complete it, run: hf download {NAME}" in done.complaint


def test_the_rest_of_a_download_that_was_repeated_does_not_matter(cache, tiny_folder):
    entry = downloaded(cache, NAME, tiny_folder("llama3"))
    (entry / "blobs" / "etag1.1a2b3c4d.incomplete").touch()
    assert open_base_model(ModelSettings(base_model_name_or_path=Path(NAME))).title == NAME


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_a_missing_shard_is_named(cache, tmp_path, family):
    folder = tiny_checkpoints.write_folder(tmp_path / "model", family, shard_size="60KB")
    entry = downloaded(cache, NAME, folder)
    next((entry / "snapshots" / COMMIT).glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=f"00002-of.*run: hf download {NAME}"):
        open_base_model(ModelSettings(base_model_name_or_path=Path(NAME)))
