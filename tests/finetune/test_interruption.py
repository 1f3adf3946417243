from __future__ import annotations

import signal
import threading
import time

import pytest

from disha.finetune import interruption as interruption_module
from disha.finetune.interruption import noticing_interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_is_noted_and_the_second_stops(number, capsys, monkeypatch):
    with noticing_interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested
        assert "stopping after this step; once more stops at once" in capsys.readouterr().err
        signal.raise_signal(number)  # the same, sent on by torchrun
        later = time.monotonic() + 2 * interruption_module.TOGETHER
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), noticing_interruption():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_noticed_and_nothing_fails():
    found = []

    def notice():
        with noticing_interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=notice)
    thread.start()
    thread.join()
    assert found == [False]


def test_of_several_processes_one_speaks(capsys):
    with noticing_interruption(speaks=False) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
    assert capsys.readouterr().err == ""
