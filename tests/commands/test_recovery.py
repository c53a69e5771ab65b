"""A run that is killed: nothing is lost, and the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from command_line import ROOT, run

LONG = ("--test-mode", "--max-iters=40", "--save-interval=10", "--eval-interval=20", "--dropout=0.1")
LONG += ("--gradient-accumulation-steps=2", "--batch-size=8", "--patience=9")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, data_dir):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert run(whole, data_dir, "training.py", *LONG).returncode == 0
    saved = killed / "checkpoints/test-base-shakespeare/step-000010"
    command = [sys.executable, str(ROOT / "training.py"), *LONG]
    with subprocess.Popen(
        command,
        cwd=killed,
        env=os.environ | {"DATA_DIR": str(data_dir)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as child:
        while not saved.exists() and child.poll() is None:
            time.sleep(0.005)
        child.kill()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    again = run(killed, data_dir, "training.py", *LONG)
    assert again.returncode == 0 and "Going on with test-base-shakespeare after step" in again.stderr
    one, other = (folder / "checkpoints/test-base-shakespeare" for folder in (whole, killed))
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    losses = [[(m["step"], m.get("loss"), m.get("val_loss")) for m in metrics(folder)] for folder in (one, other)]
    assert losses[0] == losses[1]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
