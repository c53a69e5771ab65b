"""Seconds from starting `python training.py` to its first saved step, with the corpus in the cache.

python -m benchmarks.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contest import close, parser, tell
from benchmarks.runs import ROOT
from data.corpora import load_corpus
from runtime.errors import UserError
from runtime.processes.command import run_command


def first_step(folder: str, data: Path) -> float:
    """Start a default run, wait for the folder of its first step, and end it."""
    flags = [f"--checkpoints-dir={folder}", f"--data-dir={data}", "--run-name=startup"]
    flags += ["--save-interval=1", "--keep-checkpoints=1000"]
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "training.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (Path(folder) / "startup" / "step-000001").exists():
            if process.poll() is not None:
                raise UserError(f"training.py ended before its first step, with exit status {process.returncode}")
            time.sleep(0.005)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--data-dir", type=Path, default=Path("data") / "cache")
    options = flags.parse_args()
    load_corpus("shakespeare", options.data_dir)
    seconds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(first_step(folder, options.data_dir))
    found = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "goal": 3.5}
    tell(rows := [{"what": "seconds to the first step of python training.py", **found}])
    close("startup", rows, options.record)


if __name__ == "__main__":
    run_command(main)
