"""Real training runs that are struck at an operation of the file system, and what the next start makes of them.

SOAK=1 strikes at every operation; otherwise a few of each kind of run and fault are tried. Two processes that train
together are killed, and find the disk full, at every operation of either; torn writes and a disk that fails are left to
one process, but for the reads of the second.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOAK = bool(os.environ.get("SOAK"))
QUICK = ("--kinds", "base", "lora", "pretrained", "records", "adapter", "--most", "4")
LINUX = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="Linux is needed")
TOGETHER = (
    [("--kinds", "first", "second", "--modes", "kill", "ENOSPC"), ("--kinds", "second", "--modes", "EIO")]
    if SOAK
    else [("--kinds", "first", "second", "--modes", "kill", "ENOSPC", "EIO", "--most", "1", "--skip", "120")]
)


def sweep(folder: Path, *flags: str) -> list[tuple[int, int]]:
    """How many points of each kind and mode were counted, and struck without anything bad."""
    command = [sys.executable, str(Path(__file__).with_name("fault_sweep.py")), str(folder), *flags]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = ""
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            told += line
    assert process.returncode == 0, told
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+) points counted, (\d+) struck, 0 bad", told)]


@LINUX
def test_a_fault_at_any_operation_loses_nothing(tmp_path):
    counts = sweep(tmp_path / "sweep", *([] if SOAK else QUICK))
    assert len(counts) == (24 if SOAK else 20) and all(counted == struck > 0 for counted, struck in counts)


@LINUX
@pytest.mark.parametrize("flags", TOGETHER, ids=lambda flags: " ".join(flags))
def test_a_fault_in_one_of_two_processes_loses_nothing(tmp_path, flags):
    counts = sweep(tmp_path / "sweep", *flags)
    nothing_written = "second" in flags and "ENOSPC" in flags  # so that a full disk strikes nowhere
    assert all(counted == struck for counted, struck in counts)
    assert sum(counted == 0 for counted, _ in counts) == nothing_written
