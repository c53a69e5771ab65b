"""What a person sees of a command's progress, on a terminal of any width and in a log."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from contextlib import suppress

import pytest

import runtime.progress as progress_module
from runtime.progress import Progress, duration, fitting, sparkline

with suppress(ImportError):  # on Windows
    import termios


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", type("Clock", (), {"perf_counter": lambda: now[0]}))
    return now


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys, clock):
    progress = Progress("base-x", total=100, start=0, every_seconds=10.0)
    for step in range(1, 31):
        clock[0] += 1
        progress.update(step, loss=f"{step / 10:.1f}")
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines() == [
        "base-x: step 10/100, loss 1.0, 90 s left",
        "base-x: step 20/100, loss 2.0, 80 s left",
        "base-x: step 30/100, loss 3.0, 70 s left",
    ]


def test_time_left_is_that_of_this_session(capsys, clock):
    progress = Progress("x", total=100, start=80, every_seconds=10.0)
    clock[0] += 20
    progress.update(90)
    assert capsys.readouterr().err == "x: step 90/100, 20 s left\n"


def test_values_stay_until_they_are_replaced(capsys, clock):
    progress = Progress("x", total=9, start=0, every_seconds=0.0)
    progress.update(1, loss="2", val="3")
    progress.update(2, loss="1")
    assert capsys.readouterr().err.splitlines()[1].startswith("x: step 2/9, loss 1, val 3, ")


@pytest.mark.parametrize("seconds", [0.0, 100.0])
def test_the_last_step_is_told_once_with_all_that_came_of_it(capsys, clock, seconds):
    progress = Progress("x", total=3, start=0, every_seconds=10.0)
    for step in (1, 2, 3):
        progress.update(step, loss="2")
    clock[0] += seconds
    progress.update(3, val="1.9")
    progress.close()
    progress.close()
    assert capsys.readouterr().err == "x: step 3/3, loss 2, val 1.9, 0 s left\n"


def test_a_run_that_stops_early_tells_its_last_step_once(capsys, clock):
    progress = Progress("x", total=9, start=0, every_seconds=10.0)
    progress.update(1, loss="2")
    clock[0] += 10
    progress.update(2, loss="1")
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["x: step 2/9, loss 1, 35 s left"]
    progress = Progress("x", total=9, start=0, every_seconds=10.0)
    progress.update(3, loss="1")
    progress.close()
    assert capsys.readouterr().err.startswith("x: step 3/9, loss 1, ")


def test_a_run_with_nothing_left_to_do_tells_nothing(capsys):
    Progress("x", total=9, start=9).close()
    assert capsys.readouterr().err == ""


def test_lines_can_come_with_the_steps_however_long_these_take(capsys, clock):
    progress = Progress("x", total=7, start=2, every_seconds=10.0, every_steps=2)
    for step in (3, 4, 5, 6, 7):
        clock[0] += 30
        progress.update(step, loss=f"{step}.5")
        progress.update(step, val="1")
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "x: step 4/7, loss 4.5, val 1, 90 s left",
        "x: step 6/7, loss 6.5, val 1, 30 s left",
        "x: step 7/7, loss 7.5, val 1, 0 s left",
    ]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
@pytest.mark.parametrize("every_steps", [0, 3])
def test_on_a_terminal_there_is_a_bar_and_a_plain_line_where_it_is_asked_for(monkeypatch, every_steps):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("base-x", total=4, start=1, every_seconds=0.0, every_steps=every_steps)
        for step in (2, 3, 4):
            progress.update(step, loss=f"{step}.5")
        progress.update(4, val="1.25")
        progress.close()
        progress.close()
        terminal.flush()
        text = os.read(master, 2**16).decode()
        ends = 1 + 2 * bool(every_steps)  # lines of step 3, the bar, and step 4
        while not (text.endswith("\n") and text.count("\n") >= ends):  # a terminal hands on what it is given in parts
            text += os.read(master, 2**16).decode()
    os.close(master)
    drawn = [part for part in text.replace("\x1b[A", "\r").split("\r") if "val 1.25" in part and "base-x:" not in part]
    (last,) = drawn[-1:]
    assert re.sub(r"\x1b\[[\d;]*m", "", last).strip() == "loss 4.5  val 1.25  0 s left  step 4/4  ▁▅█  base-x"
    assert text.count("\n") == ends, "one bar, drawn over itself"
    assert text.count(" s left\r\n") == ends - 1
    assert ("base-x: step 3/4, loss 3.5, 0 s left\r\n" in text) == bool(every_steps)


def test_the_clock_is_the_real_one_by_default(capsys):
    progress = Progress("x", total=9, start=0, every_seconds=0.01)
    progress.update(1)
    time.sleep(0.02)
    progress.update(2)
    assert "step 2/9" in capsys.readouterr().err


PARTS = [("loss", "loss 1.562"), ("val", "val 1.636"), ("left", "7 s left"), ("far", "step 29/50"), ("name", "lora-x")]


def test_the_line_fits_any_width_and_the_loss_stays_longest():
    whole = "  ".join(text for _, text in PARTS)
    for width in range(60):
        for coloured in (False, True):
            drawn = fitting(PARTS, width, coloured)
            line = re.sub(r"\x1b\[[\d;]*m", "", drawn)
            assert len(line) <= width and line.startswith("loss 1.562"[:width])
            assert whole.startswith(line) and (line == whole or width < len(whole))
            assert ("\x1b" in drawn) == coloured


def test_a_sparkline_goes_from_the_first_to_the_last():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([2.0] * 50 + [1.0] * 50)[::11] == "█▁"
    assert len(sparkline(list(range(1000)))) == 12 and "?" in sparkline([1.0, math.nan, 2.0])


def test_times_are_told_in_words():
    assert [duration(s) for s in (0.4, 119, 120, 3_000, 7_300)] == ["0 s", "119 s", "2 min", "50 min", "2 h 2 min"]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_terminal_without_colours_or_that_is_dumb_stays_clean(monkeypatch, name, value):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 60))
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("x", total=2, start=0)
        progress.update(1, loss="2")
        progress.update(2, loss="1")
        progress.close()
        terminal.flush()
        text = ""
        while "loss 1" not in text:
            text += os.read(master, 2**16).decode()
    os.close(master)
    assert not re.search(r"\x1b\[[\d;]*m", text)
    assert name == "NO_COLOR" or text == "x: step 2/2, loss 1, 0 s left\r\n"
