"""metrics.jsonl through interruptions, and what a person sees on a terminal and in a log."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest

from runtime import report
from runtime.training import metrics
from runtime.training.metrics import MetricsLog, Progress, read_metrics


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_lines_are_written_by_a_flush_each_once_and_in_order(path):
    log = MetricsLog(path, 0)
    assert path.read_bytes() == b""
    log.add(1, loss=1.5, lr=1e-3)
    log.add(2, loss=0.1 + 0.2)
    assert path.read_bytes() == b""
    log.flush()
    log.flush()
    log.add(2, val_loss=1.25)
    log.flush()
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [
        {"step": 1, "loss": 1.5, "lr": 1e-3},
        {"step": 2, "loss": 0.30000000000000004},
        {"step": 2, "val_loss": 1.25},
    ]


def test_a_resumed_run_writes_later_lines_anew_and_keeps_the_earlier_ones(path):
    log = MetricsLog(path, 0)
    for step in range(1, 7):
        log.add(step, loss=float(step))
        if step % 2 == 0:
            log.add(step, val_loss=float(step))
    log.flush()
    log.add(7, loss=7.0)  # never flushed: the process was killed
    before = path.read_bytes().split(b"\n")
    again = MetricsLog(path, 4)
    assert path.read_bytes().split(b"\n")[:-1] == before[:6], "up to both lines of step 4, unchanged"
    for step in (5, 6, 7):
        again.add(step, loss=float(step))
    again.flush()
    assert steps(path) == [1, 2, 2, 3, 4, 4, 5, 6, 7]


def test_resuming_where_the_log_ends_changes_nothing_and_from_the_start_clears_it(path):
    log = MetricsLog(path, 0)
    log.add(3, loss=1.0)
    log.flush()
    before = path.read_bytes()
    for resumed_at in (3, 100):
        MetricsLog(path, resumed_at)
        assert path.read_bytes() == before
    MetricsLog(path, 0)
    assert path.read_bytes() == b""


def test_values_that_are_no_numbers_survive(path):
    log = MetricsLog(path, 0)
    log.add(1, loss=math.nan, best=math.inf)
    log.flush()
    MetricsLog(path, 1)
    (line,) = read_metrics(path)
    assert math.isnan(line["loss"]) and line["best"] == math.inf


DAMAGED = [
    b'{"step": 2, "lo',
    b"[2]",
    b'"step"',
    b"null",
    b"3",
    b'{"loss": 1.0}',
    b'{"step": "2"}',
    b'{"step": 2.5}',
    b'{"step": null}',
    b'{"step": true}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5_000 + b"}",
]


def test_corrupted_lines_are_counted_and_left_out(path, capsys):
    good = [b'{"step": 1, "loss": 1.0}', b'{"step": 3, "text": "\xe2\x80\xa8"}']
    path.write_bytes(b"\n".join([good[0], *DAMAGED, b"", b"  ", good[1], b'{"step": 4']))
    assert steps(path) == [1, 3]
    told = capsys.readouterr().err
    assert told == f"{path}: {len(DAMAGED) + 1} corrupted line(s) left out\n"
    log = MetricsLog(path, 9)
    log.add(10, loss=1.0)
    log.flush()
    capsys.readouterr()
    assert steps(path) == [1, 3, 10] and capsys.readouterr().err == "", "what follows a torn line is whole"


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_each_kind_of_damage_is_told(path, capsys, line):
    path.write_bytes(line + b"\n")
    assert steps(path) == [] and "1 corrupted line" in capsys.readouterr().err


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(metrics, "time", type("Clock", (), {"perf_counter": lambda: now[0]}))
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
    import termios

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
    assert "base-x" in text and "4/4" in text and "1/4" in text and "loss=4.5" in text and "val=1.25" in text
    assert text.count("\n") == ends, "one bar, drawn over itself"
    assert text.count(" s left\r\n") == ends - 1
    assert ("base-x: step 3/4, loss 3.5, 0 s left\r\n" in text) == bool(every_steps)


def test_the_clock_is_the_real_one_by_default(capsys):
    progress = Progress("x", total=9, start=0, every_seconds=0.01)
    progress.update(1)
    time.sleep(0.02)
    progress.update(2)
    assert "step 2/9" in capsys.readouterr().err


# --- report ---------------------------------------------------------------------------------------------------------


def test_sizes_are_told_in_words():
    told = [report.size(count) for count in (None, 0, 999_949, 1_500_000, 999_999_999, 10**9, 12_345_678_901)]
    assert told == ["not available", "0.0 MB", "1.0 MB", "1.5 MB", "1000.0 MB", "1.00 GB", "12.35 GB"]


def test_a_text_is_indented_and_cut_between_words():
    assert report.indented("\nto be\n\nor not\n") == "   | to be\n   | \n   | or not"
    cut = report.indented("word " * 200, most=22)
    assert cut == "   | word word word word ..."


def test_groups_of_parameters_add_up_and_embeddings_that_outweigh_are_told():
    info = {"total": 1000, "lora": 30, "embedding": 70, "frozen": 900, "trainable": 100, "lora_percentage": 3.0}
    told = report.statistics(info, use_lora=True)
    for part in ("parameters: 1,000", "(LoRA): 30", "(embeddings): 70", "(base): 900", "3.00%", "only 10.00%"):
        assert part in told
    assert "LORA_TRAIN_EMBEDDINGS=False" in told
    assert "outweigh" not in report.statistics(info | {"lora": 70, "embedding": 30}, use_lora=True)
    full = report.statistics(info | {"trainable": 1000, "frozen": 0}, use_lora=False)
    assert "Trainable: 1,000" in full and "LoRA" not in full
