"""Our commands as several processes: by the real torchrun, one command or several of them in a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
TEXT = "".join(f"{i} times I asked: to be, or not to be? And {i * i} times nobody knew.\n" for i in range(40))
TINY = ("--test-mode", "--n-layer=1", "--n-embd=16", "--n-head=2", "--block-size=16", "--device=cpu", "--data-dir=data")
SHORT = (*TINY, "--max-iters=6", "--eval-interval=3", "--eval-iters=3", "--save-interval=3")
OURS = ("error:", "stopped after", "Stopped at")
ENDS = ("status", "out", "err")  # of the names of files that a process of a case leaves
TRACEBACK = "Traceback (most recent call last)"

ODD = """
import os, runpy, sys
sys.path.insert(0, {root!r})
if os.environ["RANK"] == {rank!r}:
    from jobs.runs import loop
    from runtime.errors import UserError
    one_step = loop.Training.one_step
    def odd(this):
        if this.state.step == 12:
            raise {error}
        one_step(this)
    loop.Training.one_step = odd
runpy.run_path({root!r} + "/training.py", run_name="__main__")
"""  # training.py, with an error in one process


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
    """How a process of a case ended: its status, as waitpid tells it, and what it printed on stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def told(self) -> str:
        return self.out + self.err


def in_a_row(folder: Path, processes: int, cases: dict[str, Case], seconds: float = 120) -> dict[str, list[Ended]]:
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
    subprocess.run(torchrun(processes, script, said), cwd=folder, env=clean(), check=True, timeout=seconds)
    return {name: [_ended(said / f"{name}.{rank}") for rank in range(processes)] for name in cases}


def _ended(path: Path) -> Ended:
    status, out, err = (path.with_name(f"{path.name}.{end}").read_text("utf-8", "replace") for end in ENDS)
    return Ended(int(status), out, err)


class Started:
    """A command that torchrun has started, which goes on."""

    def __init__(self, folder: Path, processes: int, *words: Any, **environ: str) -> None:
        self.path = folder / "told"
        with self.path.open("wb") as told:
            self.agent = subprocess.Popen(
                torchrun(processes, *words), cwd=folder, env=clean(**environ), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.workers: list[int] = []  # their numbers with the system, by theirs with torchrun

    @property
    def told(self) -> str:
        return self.path.read_text("utf-8", "replace")

    def wait_until(self, happened: Callable[[], Any], seconds: float = 90) -> None:
        """Wait for something that happens while the command runs, and note who its processes are."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.agent.poll() is None, self.told
            assert time.monotonic() < end, self.told
            time.sleep(0.02)
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        ranks = {rank: int(pid) for pid in children if (rank := _rank(int(pid))) is not None}
        self.workers = [ranks[rank] for rank in sorted(ranks)]

    def end(self, seconds: float = 60) -> str:
        """Wait until all of it has ended, and see that no process is left; what was printed."""
        began = time.monotonic()
        try:
            self.agent.wait(seconds)
            while any(map(_alive, self.workers)) and time.monotonic() < began + seconds:
                time.sleep(0.02)
        finally:
            self.took = time.monotonic() - began
            left = [pid for pid in self.workers if _alive(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            if self.agent.poll() is None:
                os.killpg(self.agent.pid, signal.SIGKILL)
                self.agent.wait()
        assert not left, f"{left} outlived torchrun: {self.told}"
        return self.told


def _rank(pid: int) -> int | None:
    """The number that torchrun gave a process, None where it is no process of a command or is gone."""
    try:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(value[5:]) for value in values if value.startswith(b"RANK=")), None)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
