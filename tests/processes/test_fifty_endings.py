"""Fifty runs of four processes come to their end, publish what they trained, and end with status 0; only with SOAK=1.

What a library's threads still hold when a process ends may abort it. That must never make a run look as if it failed.
"""

from __future__ import annotations

import os

import pytest
from starts import SHORT, TEXT, Case, in_a_row

from runtime.storage.runs import open_run

RUNS = 50
SOAK = bool(os.environ.get("SOAK"))


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="takes minutes; SOAK=1 runs it")
def test_an_ending_never_fails(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = (*SHORT, "--dataset=text.txt", "--batch-size=4", "--step-parts=4", "--max-iters=2")
    names = [f"run-{i}" for i in range(RUNS)]
    ended = in_a_row(tmp_path, 4, {name: Case((*words, f"--run-name={name}")) for name in names}, seconds=1200)
    statuses = [process.status for processes in ended.values() for process in processes]
    published = [name for name in names if (run := open_run(tmp_path / "checkpoints" / name)) and run.finished]
    told = [process.told for processes in ended.values() for process in processes[1:]]
    print(f"{statuses.count(0)} of {4 * RUNS} processes ended with 0, {len(published)} of {RUNS} runs published")
    assert statuses == [0] * 4 * RUNS and published == names and not any(told)
