"""How much memory a part of a benchmark needs at most: measured in a fresh process, which nothing else has filled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.device import Machine
from runtime.errors import UserError


@contextmanager
def told_peak(machine: Machine) -> Iterator[None]:
    """Prints how many bytes were held at most inside the `with` block, beyond what was held before it.

    Raises UserError where the system does not tell.
    """
    before = machine.restart_peak_memory()
    yield
    if before is None or (after := machine.peak_memory()) is None:
        raise UserError(f"this system does not tell how much memory {machine} takes")
    print(json.dumps(after - before))


def peak_of(what: str, module: str, *words: str) -> int:
    """The bytes that a benchmark, run by itself, prints last. what: is measured. Raises UserError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"measuring {what} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(what: str, share: float, goal: float | None) -> dict[str, Any]:
    """A row of one measurement, as `contest.tell` prints it."""
    return {"what": what, "median": share, "min": share, "max": share, "goal": goal}
