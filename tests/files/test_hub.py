"""An adapter by its name on the Hugging Face Hub, of which a server on this machine stands in."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from torch import nn

import disha
from tests.conftest import perturb

pytest.importorskip("huggingface_hub")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks of one repository, `someone/adapter`."""

    files: ClassVar = {}  # commit -> name -> content

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        asked = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        if asked.startswith("someone/adapter/revision/"):
            commit = COMMITS.get(asked.rpartition("/")[2])
            names = [{"rfilename": name} for name in self.files.get(commit, ())]
            self.answer({"id": "someone/adapter", "sha": commit, "siblings": names}, commit)
        elif asked.startswith("someone/adapter/tree/"):
            commit = asked.rpartition("/")[2]
            held = self.files[COMMITS.get(commit, commit)]
            entries = [self.entry(name, content) for name, content in held.items()]
            self.answer(entries, commit)
        elif asked.startswith("someone/adapter/resolve/"):
            *_, commit, name = asked.split("/")
            self.send(self.files[commit].get(name), commit)
        else:
            self.send(None, None)

    def entry(self, name, content):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def answer(self, fields, commit):
        self.send(None if commit is None else json.dumps(fields).encode(), commit)

    def send(self, content, commit):
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
            content = b""
        else:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *unused):
        pass


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


@pytest.fixture
def python(tmp_path):
    """Run Python in a folder, with the stand-in as the Hub."""
    for seed, commit in enumerate(COMMITS.values()):
        path = tmp_path / commit
        disha.save_adapter(perturb(disha.inject_adapters(model(), "0", 4), seed), path)
        Hub.files[commit] = {"adapter.safetensors": path.read_bytes(), "more.bin": b"not fetched"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(*words):
        environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    yield run
    server.shutdown()
    server.server_close()


LOAD = """
import sys, torch, disha
from huggingface_hub import constants
from torch import nn
from disha.cli import main

for constants.HF_HUB_OFFLINE in (False, True):  # the second time from the cache
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        disha.load_adapter(model, name)
        print(float(disha.adapter_parameters(model)[0].detach().sum()))
main(["inspect", sys.argv[1]])
constants.HF_HUB_OFFLINE = False
sys.exit(main(["inspect", "someone/other"]))
"""


def test_a_name_is_fetched_with_its_revision_and_kept(python, tmp_path):
    names = ["someone/adapter", "someone/adapter@v1"]
    expected = []
    for commit in COMMITS.values():
        here = model()
        disha.load_adapter(here, tmp_path / commit)
        expected.append(str(float(disha.adapter_parameters(here)[0].sum())))
    done = python("-c", LOAD, *names)
    *sums, shown = done.stdout.split(maxsplit=4)
    assert sums == 2 * expected, done.stderr
    assert "1 layer" in shown
    assert not list((tmp_path / "cache").rglob("more.bin"))
    # A name that exists nowhere gives one line of error.
    assert done.returncode == 1
    assert "someone/other is neither here nor on the Hugging Face Hub: 404" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_path_is_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("here/absent", "absent/a.safetensors", "a", "/absent/adapter"):
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(disha.AdapterIOError, match="check the path"):
            disha.inspect_adapter(name)
    with pytest.raises(disha.MissingPackageError, match="install huggingface_hub"):
        disha.inspect_adapter("someone/adapter")
