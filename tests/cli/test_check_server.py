"""`disha check-server` against a stand-in: real models behind an `http.server` of this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import disha
from disha.cli.check_server import log_probs_of
from disha.finetune.base import load_base
from tests.conftest import perturb


class Answers(BaseHTTPRequestHandler):
    """Answers as vLLM does, with the models of its server."""

    def answer(self, fields, code=200):
        self.send(json.dumps(fields).encode(), code)

    def send(self, data, code):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if isinstance(self.server.gives, bytes):
            self.send(self.server.gives, 200)
            return
        names = self.server.models
        self.answer({"data": [{"id": one, "parent": "b" if one != "b" else None} for one in names]})

    def do_POST(self):
        assert self.headers["Content-Type"] == "application/json"
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["max_tokens"] < 1:
            self.answer({"message": "max_tokens must be at least 1"}, 400)
            return
        if self.server.gives == "an error":
            self.answer({"message": "prompt_logprobs is too many"}, 400)
            return
        if self.server.gives == "no text":
            self.send(b"\xff", 500)
            return
        if isinstance(self.server.gives, list):
            self.answer(self.server.gives)
            return
        found = log_probs_of(self.server.models[asked["model"]], asked["prompt"]).tolist()
        chosen = zip(asked["prompt"][1:], found, strict=True)
        listed = [None, *({str(token): {"logprob": value}} for token, value in chosen)]
        listed = listed if self.server.gives else None
        self.answer({"choices": [{"prompt_logprobs": listed}]})

    def log_message(self, *unused):
        """Print nothing."""


@pytest.fixture
def serve():
    """Serve models by their names, of which `b` is the base; return the URL."""
    servers = []

    def start(gives=True, **models):
        server = HTTPServer(("127.0.0.1", 0), Answers)
        server.models, server.gives = models, gives
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def models(language_model):
    """The base, with the adapter, with another one, and another base."""
    base, mine, another, other_base = (
        load_base(str(language_model / "model"))[0].eval() for _ in range(4)
    )
    disha.load_adapter(mine, language_model / "adapter.safetensors")
    perturb(disha.inject_adapters(another, "all-linear", r=4, exclude="lm_head"), seed=9)
    with torch.no_grad():
        other_base.lm_head.weight.neg_()
    return {"base": base, "mine": mine, "another": another, "other base": other_base}


@pytest.mark.parametrize(
    ("adapted", "base", "code", "verdict"),
    [
        ("mine", "base", 0, "a: acts, equal within"),
        ("base", "base", 1, "a: does not act: the answers are the base's"),
        ("another", "base", 1, "a: another adapter's: its answers differ by"),
        ("mine", "other base", 1, "a: another base: its answers differ by"),
    ],
)
def test_it_says_what_the_server_answers_with(
    run, serve, language_model, models, adapted, base, code, verdict
):
    url = serve(b=models[base], a=models[adapted])
    adapter = language_model / "adapter.safetensors"
    done = run("check-server", url, "--adapter", adapter, "--base", language_model / "model")
    assert done.code == code, done.err
    assert done.out.startswith(verdict)
    found = run("check-server", f"{url}/v1/", "--adapter", adapter, "--name", "a", "--json").json
    assert found["acts"] == (code == 0)


def test_a_server_that_does_not_fit_is_told_in_a_line(run, serve, language_model, models):
    adapter = language_model / "adapter.safetensors"

    def complaint(url, *flags):
        done = run("check-server", url, "--adapter", adapter, *flags)
        assert (done.out, done.code) == ("", 2)
        return done.err

    both = {"b": models["base"], "a": models["mine"]}
    url, two = serve(**both), serve(**both, c=models["mine"])
    names = "name an adapter of the server with --name; it has b, a"
    assert names in complaint(url, "--name", "x")
    assert names in complaint(url, "--name", "b")
    assert f"{names}, c" in complaint(two)
    assert "gives no log-probabilities" in complaint(serve(gives=False, **both))
    refused = complaint(serve(gives="an error", **both))
    assert 'answers 400 Bad Request: {"message": "prompt_logprobs is too many"}' in refused
    assert "answers 500 Internal Server Error" in complaint(serve(gives="no text", **both))
    assert "Connection refused" in complaint("http://127.0.0.1:9")


OTHER_SHAPES = (
    *(b"[]", b"{}", b"null", b'{"data": 1}', b'{"data": [1]}', b'{"data": [{}]}'),
    b'{"data": [{"id": "b", "parent": 5}, {"id": ["a"]}]}',
)


@pytest.mark.parametrize("data", OTHER_SHAPES)
def test_json_of_another_shape(complaint, serve, language_model, data):
    told = complaint(
        "check-server", serve(gives=data), "--adapter", language_model / "adapter.safetensors"
    )
    assert "JSON of another shape" in told or "name an adapter of the server with --name" in told


@pytest.mark.parametrize("data", [b"<html>hello</html>", b"", b"\xff", b"[" * 100_000])
def test_what_is_no_json(complaint, serve, language_model, data):
    adapter = language_model / "adapter.safetensors"
    told = complaint("check-server", serve(gives=data), "--adapter", adapter)
    assert "gives no JSON" in told
    assert len(told) < 400


@pytest.mark.parametrize("data", [[], [1], [{"choices": []}], [{"choices": [{}]}]])
def test_an_answer_of_another_shape(run, serve, language_model, models, data):
    url = serve(gives=data, b=models["base"], a=models["mine"])
    done = run("check-server", url, "--adapter", language_model / "adapter.safetensors")
    assert done.code == 2
    assert "JSON of another shape than vLLM's" in done.err.splitlines()[-1]


def test_the_adapter_is_looked_for_before_the_server_is_asked(complaint, serve, tmp_path):
    told = complaint("check-server", serve(gives=b"<html>"), "--adapter", tmp_path / "absent")
    assert "absent" in told
