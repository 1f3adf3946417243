"""Two answers beside each other, on a narrow terminal."""

from __future__ import annotations

from disha.cli.generate import _print_side_by_side


def test_no_part_of_an_answer_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    digits = "".join(str(place % 10) for place in range(90))
    _print_side_by_side([digits], ["short"])
    shown = capsys.readouterr().out
    assert "".join(character for character in shown if character.isdigit()) == digits
