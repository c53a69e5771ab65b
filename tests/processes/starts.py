"""Our commands as several processes: by the real torchrun, one command or several of them in a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
TEXT = "".join(f"{i} times I asked: to be, or not to be? And {i * i} times nobody knew.\n" for i in range(40))
TINY = ("--test-mode", "--n-layer=1", "--n-embd=16", "--n-head=2", "--block-size=16", "--device=cpu", "--data-dir=data")
SHORT = (*TINY, "--max-iters=6", "--eval-interval=3", "--eval-iters=3", "--save-interval=3")
OURS = ("error:", "stopped after", "Stopped at")
TRACEBACK = "Traceback (most recent call last)"


def clean(**more: str) -> dict[str, str]:
    """An environment with nothing of this machine's own settings."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | more


def torchrun(processes: int, *words: Any) -> list[str]:
    """The command that starts so many processes of a script."""
    start = ["torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *(["-m", *start] if start else []), *map(str, words)]


def of_ours(told: str) -> list[str]:
    """The lines by which a command of ours says why it ended."""
    return [line for line in told.splitlines() if line.startswith(OURS)]


@dataclass
class Case:
    """A command in a row of them. environ: what it finds in the environment beside what torchrun sets; odd: beside
    that, in one process, by its number. interrupt: the process and the step, of its steps in this start, in the middle
    of which it gets SIGTERM."""

    words: tuple[Any, ...]
    script: str = "training.py"
    environ: tuple[tuple[str, str], ...] = ()
    odd: tuple[tuple[str, dict[str, str]], ...] = ()
    interrupt: tuple[int, int] | None = None


@dataclass
class Ended:
    """How a process of a case ended: its status, as waitpid tells it, and what it printed."""

    status: int
    told: str


def in_a_row(folder: Path, processes: int, cases: dict[str, Case]) -> dict[str, list[Ended]]:
    """Run commands one after the other in one start of so many processes, in `folder`; the endings of each by name.

    One start costs seconds of every process, nearly all of it imports, which the commands share.
    """
    said = folder / f"said-{processes}"
    said.mkdir()
    rows = [
        {"name": name, "words": [case.script, *map(str, case.words)], "environ": dict(case.environ)}
        | {"odd": dict(case.odd), "interrupt": case.interrupt}
        for name, case in cases.items()
    ]
    (said / "cases.json").write_text(json.dumps(rows))
    script = Path(__file__).with_name("row_of_commands.py")
    subprocess.run(torchrun(processes, script, said), cwd=folder, env=clean(), check=True, timeout=240)
    return {name: [_ended(said / f"{name}.{rank}") for rank in range(processes)] for name in cases}


def _ended(path: Path) -> Ended:
    return Ended(int(path.with_name(f"{path.name}.status").read_text()), path.read_text("utf-8", "replace"))
