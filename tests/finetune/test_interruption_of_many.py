from __future__ import annotations

import signal

from disha.finetune.interruption import noticing_interruption


def test_of_several_processes_one_says_that_it_stops(capsys):
    with noticing_interruption(speaks=False) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
    assert capsys.readouterr() == ("", "")
