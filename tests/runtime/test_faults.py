"""Real training runs that are struck at an operation of the file system, and what the next start makes of them.

SOAK=1 strikes at every operation; otherwise a few of each kind of run and fault are tried.
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


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="Linux is needed")
def test_a_fault_at_any_operation_loses_nothing(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("fault_sweep.py")), str(tmp_path / "sweep")]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = ""
    with subprocess.Popen(
        [*command, *([] if SOAK else QUICK)], env=environ, stdout=subprocess.PIPE, text=True
    ) as sweep:
        for line in sweep.stdout:
            print(line, end="", flush=True)
            told += line
    assert sweep.returncode == 0, told
    counts = re.findall(r"(\d+) points counted, (\d+) struck, 0 bad", told)
    assert len(counts) == (24 if SOAK else 20) and all(int(counted) == int(struck) > 0 for counted, struck in counts)
