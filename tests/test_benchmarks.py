"""The benchmarks run: on a model so small that they measure nothing, and keeping no figures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
CALLS = {
    "lora_step": ("--sizes", "tiny", "--tokens", "64", "--rounds", "1"),
    "variants": ("--sizes", "tiny", "--tokens", "64", "--rounds", "1"),
    "generate": ("--sizes", "tiny", "--rounds", "1"),
    "levers": ("--sizes", "tiny", "--rounds", "1"),
    "estimates": ("--only", "tiny"),
    "memory": ("--sizes", "tiny", "--rounds", "1"),
    "saving": ("--sizes", "tiny", "--rounds", "1"),
    "startup": ("--rounds", "1"),
}


def kept() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RESULTS.iterdir()}


@pytest.mark.parametrize("name", CALLS)
def test_a_benchmark_runs_and_prints_its_rows(name: str, monkeypatch, capsys, data_dir, tmp_path) -> None:
    before, where = kept(), ("--data-dir", str(data_dir)) if name in ("saving", "startup") else ()
    where += ("--folder", str(tmp_path)) if name == "saving" else ()
    monkeypatch.setattr(sys, "argv", [name, *CALLS[name], *where, "--device", "cpu"])
    importlib.import_module(f"benchmarks.{name}").main()
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"\w.* (\d+\.\d\d) +\(\d+\.\d\d to \d+\.\d\d\).*", line) for line in lines[:-1]]
    assert rows and all(row and float(row[1]) > 0 for row in rows), lines
    assert kept() == before


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
