"""Our commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
NO_TRACEBACK = "Traceback (most recent call last)"
PYTHON = f"{sys.executable} {ROOT}/"  # how a command that is printed begins, as tests run in folders of their own


def run(folder: Path, data_dir: Path, command: str, *flags: str, **environ: str) -> subprocess.CompletedProcess:
    """A command of ours in `folder`, with nothing of this machine's own settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LORA_", "USE_LORA", "TEST_MODE"))}
    environ = clean | {"DATA_DIR": str(data_dir), "PYTHONIOENCODING": "utf-8"} | environ
    done = warm.run([ROOT / command, *flags], folder, environ)
    assert NO_TRACEBACK not in done.stderr, done.stderr
    return done
