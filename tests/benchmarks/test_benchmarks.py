"""The benchmarks run: on a model so small that they measure nothing, and keeping no figures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import beside, waits
from benchmarks.contest import SIZES, tell
from benchmarks.peers import ours
from benchmarks.scaling import table
from benchmarks.workers import Group
from jobs.comparing.timing import repeatable
from runtime.device import pick_machine
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
    "cuda": ("--sizes", "tiny", "--rounds", "1", "--eager"),
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


def test_a_benchmark_runs_beside_an_earlier_revisions(monkeypatch, capsys) -> None:
    words = ("--turns", "1", str(RESULTS.parents[1]), "variants", *CALLS["variants"], "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["beside", *words])
    beside.main()
    rows = capsys.readouterr().out.splitlines()[:-1]
    both = r"\w.* \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) +earlier \d+\.\d\d \(.*\)"
    assert len(rows) == 6 and all(re.fullmatch(both, row) for row in rows), rows


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cpu", "--record"), "this needs a CUDA GPU, and --device cpu takes the cpu here, with torch "),
        (
            ("--device", "cpu", "--nanogpt", "nowhere"),
            "--nanogpt nowhere: .*model.py is missing; it must be a copy of ",
        ),
    ],
)
def test_steps_on_a_gpu_are_refused_before_any_is_taken(words: tuple[str, ...], message: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda", *words, "--eager"])
    with pytest.raises(UserError, match=message):
        importlib.import_module("benchmarks.cuda").main()


def test_waits_are_counted_in_a_profile_and_left_out_where_it_shows_none(monkeypatch, capsys) -> None:
    counts = [torch.ones(()), torch.ones(())]
    names = [name for name, _ in waits.calls_of(lambda: [count.item() for count in counts])]
    assert names.count("aten::_local_scalar_dense") == 2
    tokens = torch.zeros(2, 17, dtype=torch.long)
    stepper = repeatable(ours(SIZES["tiny"], lora=True), tokens, pick_machine("cpu", "fp32"))

    def take() -> None:
        for i in range(3):
            stepper.step(i)

    assert waits.row_of_waits("tiny", take, 3, stepper) is None  # a CPU is not waited for
    assert capsys.readouterr().err.startswith("tiny: waits of the host are left out, as the profile does not show ")
    monkeypatch.setattr(waits, "WAITS", "aten::stack")  # twice a step: counts and norms; and where a loss is read
    row = waits.row_of_waits("tiny", take, 3, stepper)
    tell([row | {"median": 0.0}])
    assert row["median"] == 2 and capsys.readouterr().out.endswith(" goal 0\n")


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
