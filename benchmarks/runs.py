"""Runs of training.py, as a person starts them, and what they came to.

Runs live in `checkpoints/bench/`; a finished one is not trained again, so a benchmark that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("checkpoints") / "bench"


def train(name: str, **settings: object) -> dict:
    """Train a run of this name with these settings; returns its result.json. Raises UserError where it fails."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "training.py"), f"--run-name={name}", f"--checkpoints-dir={RUNS}", *flags]
    print("$", "python training.py", *command[2:], file=sys.stderr, flush=True)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise UserError(f"training {name} failed with exit status {done.returncode}; its message is above")
    return json.loads((RUNS / name / "result.json").read_bytes())


def median(values: Iterable[float]) -> str:
    """The median with the range, as in `1.642 (1.640 to 1.645)`."""
    values = sorted(values)
    return f"{statistics.median(values):.4f} ({values[0]:.4f} to {values[-1]:.4f})"
