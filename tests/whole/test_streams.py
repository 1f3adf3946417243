"""Streams of tokens under a server: each step of a generator runs in a copy of some context."""

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from torch import nn

import disha

ADAPTERS = [f"tenant{number}" for number in range(10)]
STREAMS = 100
TOKENS = 8


class Counter(nn.Module):
    """Adds to a token what its layer says, which each adapter changes in its own way."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.step.weight.fill_(1.0)

    def forward(self, token):
        return token + self.step(torch.ones(1, 1))


@pytest.fixture(scope="module")
def model():
    model = Counter()
    for number, name in enumerate(ADAPTERS, 1):
        disha.inject_adapters(model, "step", 1, adapter=name)
        model.step.disha[name].block.data.fill_(number)
    disha.set_active_adapters(model, [])
    return model


@pytest.fixture(scope="module")
def port(model):
    """Serve the model, and return the port."""

    def generate():
        token = torch.zeros(1, 1)
        for _ in range(TOKENS):
            token = model(token)
            yield f"{int(token)} "

    def answer(request):
        name = request.path_params["adapter"]
        return StreamingResponse(disha.adapters_active(model, name)(generate)())

    app = Starlette(routes=[Route("/{adapter}", answer)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def test_each_of_many_streams_has_its_own_adapter(port):
    barrier = threading.Barrier(20)

    def read(number):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        barrier.wait()  # so that twenty streams take turns
        connection.request("GET", f"/{ADAPTERS[number % len(ADAPTERS)]}")
        return connection.getresponse().read().decode()

    with ThreadPoolExecutor(20) as readers:
        answers = list(readers.map(read, range(STREAMS)))
    for number, answer in enumerate(answers):
        step = 2 + number % len(ADAPTERS)  # 1 of the base, and that of the adapter
        assert answer.split() == [str(step * count) for count in range(1, TOKENS + 1)]
