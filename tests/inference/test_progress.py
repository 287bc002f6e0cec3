"""Bars: silent unless a terminal watches, patient, and lines of one display within one another."""

import io

import pytest
from rich.console import Console

import pyrolvm.progress as module
from pyrolvm.progress import Bar, progress_bar


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal gets to see."""
    stream = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda **_: Console(file=stream, force_terminal=True, width=120, color_system=None)
    )
    return stream


def test_nothing_is_said_unless_a_terminal_watches(capsys):
    with progress_bar("fit", 3) as bar:
        assert type(bar) is Bar
        bar.advance(3)
        assert bar.done == 3
    assert capsys.readouterr() == ("", "")


def test_nothing_is_said_if_not_asked_for_or_over_at_once(terminal):
    with progress_bar("fit", 3, enabled=False) as bar:
        bar.advance(3)
    with progress_bar("fit", 3, after=100.0) as bar:
        bar.advance(3)
    assert terminal.getvalue() == ""


def test_a_bar_says_how_far_how_fast_and_what(terminal):
    with progress_bar("evidence", 2000, unit="draws") as bar:
        bar.advance(1500)
        bar.advance(500)
    assert "evidence" in terminal.getvalue()
    assert "2,000/2,000" in terminal.getvalue()
    assert "draws/s" in terminal.getvalue()


def test_a_bar_inside_another_is_a_line_of_it_and_goes(terminal):
    with progress_bar("outer", 2) as outer:
        with progress_bar("inner", 5) as inner:
            assert inner.progress is outer.progress
            inner.update(5)
            assert len(outer.progress.tasks) == 2
        assert len(outer.progress.tasks) == 1
        outer.update(2)
    assert module._open == []
    with progress_bar("next", 1) as bar:
        assert bar.progress is not outer.progress
