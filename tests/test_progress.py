"""Bars: silent unless a terminal watches, patient, and lines of one display within one another."""

import io
import sys
import threading
import time

from pyrolvm.progress import progress_bar, watched


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watching(monkeypatch):
    """What a terminal gets to see from now on (no fixture: pytest replaces standard error after those)."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_nothing_is_shown_unless_a_terminal_watches(capsys):
    with progress_bar("fit", 3) as bar:
        bar.begin(0)
        bar.note("compiling")
        bar.advance(3)
        assert bar.done == 3
    assert list(watched([1, 2], "fit", 2)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_if_not_enabled_or_over_at_once(monkeypatch):
    terminal = watching(monkeypatch)
    with progress_bar("fit", 3, enabled=False) as bar:
        bar.note("compiling")
        bar.advance(3)
    with progress_bar("fit", 3, after=100.0) as bar:
        bar.note("compiling")
        bar.advance(3)
    assert terminal.getvalue() == ""


def test_a_bar_shows_how_far_how_fast_and_what(monkeypatch):
    terminal = watching(monkeypatch)
    with progress_bar("evidence", 2000, unit="draws") as bar:
        bar.note("compiling")
        assert "compiling" in terminal.getvalue()
        bar.advance(1500)
        bar.update(2000, ELBO=-1.25)
    last = terminal.getvalue().split("\r")[-1]
    for part in ("evidence", "2,000/2,000", "draws/s", "ELBO -1.250"):
        assert part in last
    assert "compiling" not in last


def test_the_speed_of_a_resumed_run_is_of_its_own_steps(monkeypatch):
    terminal = watching(monkeypatch)
    with progress_bar("fit", 1_000_100) as bar:
        bar.begin(1_000_000)
        time.sleep(0.1)
        bar.update(1_000_100)
    last = terminal.getvalue().split("\r")[-1]
    assert "1,000,100/1,000,100" in last
    assert 50 < float(last.split(", ")[-1].split()[0].replace(",", "")) <= 1000


def test_more_steps_than_announced_and_no_speed_without_a_unit(monkeypatch):
    terminal = watching(monkeypatch)
    with progress_bar("chunks", 2, unit="") as bar:
        bar.advance(2.5)
    assert "2/2" in terminal.getvalue()
    assert "/s" not in terminal.getvalue()


def test_a_bar_inside_another_is_a_further_line_and_vanishes(monkeypatch):
    terminal = watching(monkeypatch)
    with progress_bar("outer", 2) as outer:
        with progress_bar("inner", 5) as inner:
            assert "inner" in terminal.getvalue()
            inner.update(5)
        outer.update(2)
    *_, last = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "outer" in last
    assert terminal.getvalue().endswith("\n")


def test_a_bar_starts_no_thread(monkeypatch):
    watching(monkeypatch)
    before = threading.active_count()
    with progress_bar("fit", 3):
        assert threading.active_count() == before
