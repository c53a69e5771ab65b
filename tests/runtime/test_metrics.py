"""metrics.jsonl through interruptions, and sizes in words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from runtime import report
from runtime.training.metrics import MetricsLog, read_metrics


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
