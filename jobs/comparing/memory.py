"""How much memory a few steps of a job take, each measured in a fresh process, which nothing else has filled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from jobs.runs.job import prepare
from models.pretrained.source import find_source
from runtime.device import pick_machine
from runtime.errors import UserError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved

STEPS = 3
START = "import sys; sys.path.insert(0, {root!r}); from jobs.comparing.memory import child; child()"


def peak_memory(settings: Settings) -> int | None:
    """The most bytes that a fresh process holds while it takes a few steps of this job, beyond what it held before
    the model was built; None where the system does not tell. Raises UserError where that process fails."""
    start = START.format(root=str(Path(__file__).resolve().parents[2]))
    command = [sys.executable, "-c", start]
    done = subprocess.run(command, input=json.dumps(settings.as_dict()), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"measuring memory failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout)


def child() -> None:
    """What the fresh process does: read settings as JSON, take the steps, print the bytes."""
    settings = Settings.from_dict(json.load(sys.stdin))
    machine = pick_machine(settings.device, settings.dtype)
    before = machine.restart_peak_memory()
    job = prepare(
        Resolved(settings, {"BLOCK_SIZE": "job"}), machine, find_source(Path(settings.checkpoints_dir), settings.base)
    )
    stepper = job.stepper()
    for step in range(STEPS):
        stepper.step(step)
    stepper.read_loss()
    after = machine.peak_memory()
    print(json.dumps(None if after is None or before is None else after - before))
