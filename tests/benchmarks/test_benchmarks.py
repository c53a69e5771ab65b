"""The benchmarks run: on a model so small that they measure nothing, and keeping no figures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import table
from benchmarks.workers import Group
from runtime.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
CALLS = {
    "lora_step": ("--sizes", "tiny", "--tokens", "64", "--rounds", "1"),
    "variants": ("--sizes", "tiny", "--tokens", "64", "--rounds", "1"),
    "generate": ("--sizes", "tiny", "--rounds", "1"),
    "generate: adapters": ("--sizes", "tiny", "--rounds", "1", "--adapters", "2"),
    "peers_slow": ("--shapes", "tiny", "--rounds", "1"),
    "levers": ("--sizes", "tiny", "--rounds", "1"),
    "estimates": ("--only", "tiny"),
    "memory": ("--sizes", "tiny", "--rounds", "1"),
    "saving": ("--sizes", "tiny", "--rounds", "1"),
    "startup": ("--rounds", "1"),
    "scaling": ("--size", "tiny", "--tokens", "64", "--rounds", "1", "--kinds", "LoRA", "--lengths", "1", "100"),
}


def kept() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RESULTS.iterdir()}


@pytest.mark.parametrize("name", CALLS)
def test_a_benchmark_runs_and_prints_its_rows(name: str, monkeypatch, capsys, data_dir, tmp_path) -> None:
    before, where = kept(), ("--data-dir", str(data_dir)) if name in ("saving", "startup") else ()
    where += ("--folder", str(tmp_path)) if name == "saving" else ()
    monkeypatch.setattr(sys, "argv", [name, *CALLS[name], *where, "--device", "cpu"])
    importlib.import_module(f"benchmarks.{name.partition(':')[0]}").main()
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"\w.* (\d+\.\d\d) +\(\d+\.\d\d to \d+\.\d\d\).*", line) for line in lines[:-1]]
    assert rows and all(row and float(row[1]) > 0 for row in rows), lines
    assert kept() == before


def test_the_table_of_several_processes_is_made_of_the_rows() -> None:
    about = {"what": "10.7M, 4096 tokens", "dtype": "bf16", "name": "LoRA", "weights": 9}
    one = about | {"team": "1x1", "way": "exact", "seconds": 2.0, "median": 2048.0}
    two = about | {"team": "2x1", "way": "exact", "seconds": 1.0, "median": 4096.0, "formula_bytes": 2.5e6}
    ratio = {"against": "1x1", "median": 1.97, "min": 1.5, "max": 2.0} | about | {"team": "2x1", "way": "exact"}
    held = {"peak": True, "median": 512.4} | about | {"team": "2x1", "way": "exact"}
    other = held | {"what": "85M, 1024 tokens", "median": 2066.0}
    lines = table([one, two | {"reduction_seconds": 0.0014}, ratio, held, other]).splitlines()
    assert lines[2] == "| LoRA, bf16 | 1x1 | 2,048 |  |  |  |  |  |"
    assert lines[3] == "| LoRA, bf16 | 2x1, exact | 4,096 | 1.97 (1.50 to 2.00) |  | 1.4 | 2.50 | 512 |"


def test_a_process_that_fails_is_told_in_a_line() -> None:
    with Group(2, 1, "cpu") as group, pytest.raises(UserError, match="2 processes of 1 thread ended: "):
        group.ask("steps", training={"kind": "unknown"}, count=1)


def test_where_memory_goes_is_drawn(monkeypatch, capsys, tmp_path) -> None:
    words = ("--size", "tiny", "--tokens", "64", "--out", str(tmp_path / "memory.png"))
    monkeypatch.setattr(sys, "argv", ["memory_parts", *words])
    importlib.import_module("benchmarks.memory_parts").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("tiny, 64 tokens, ") for line in lines)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_results_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        about = json.loads(path.read_bytes())
        assert about["machine"] and about["date"] and about["rows"], path.name
        assert all(row["min"] <= row["median"] <= row["max"] for row in about["rows"])
