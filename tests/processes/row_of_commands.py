"""Commands one after the other in one start of torchrun, or of Python: each in children that its processes fork.

python -m torch.distributed.run --nproc-per-node 2 row_of_commands.py FOLDER

FOLDER/cases.json says which, as `starts.py` writes it. What process r prints in a case is left in FOLDER/NAME.r.out and
FOLDER/NAME.r.err, and its status in FOLDER/NAME.r.status. Processes of different cases never meet: what they tell each
other is kept by the case.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch import _dynamo  # noqa: F401 - what the first optimizer would import, in every child anew

import jobs.generating.command  # what commands need, once
import jobs.judging.command
import jobs.summaries.answers
import jobs.summaries.text
import jobs.training.command
from jobs.runs import loop

ROOT = Path(__file__).resolve().parents[2]


def meet_by(name: str) -> None:
    """Keep what processes tell each other apart from that of other cases."""
    meet = dist.rendezvous
    dist.rendezvous = lambda *where, **how: (
        (dist.PrefixStore(name, store), *rest) for store, *rest in meet(*where, **how)
    )


def interrupt_in(step: int) -> None:
    """Have SIGTERM come in the middle of a step."""
    take_step, taken = loop.Stepper.step, []

    def with_signal(stepper, number):
        taken.append(number)
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(stepper, number)

    loop.Stepper.step = with_signal


def child(case: dict, rank: int, said: Path) -> None:
    """Run the case's command, in this process for good."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
    jobs.summaries.text.TEST_SAMPLE_CHARACTERS = jobs.summaries.answers.LONGEST = 4
    os.environ.update(case["environ"] | case["odd"].get(str(rank), {}))
    meet_by(case["name"])
    if case["interrupt"] and case["interrupt"][0] == rank:
        interrupt_in(case["interrupt"][1])
    script, *words = case["words"]
    sys.argv = [str(ROOT / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(case: dict, rank: int, said: Path) -> None:
    """Fork a child for a case, and note how it ended. Where one fails, the others get SIGTERM, as from torchrun."""
    for name in ("out", "err"):  # also where SIGTERM comes before the child has begun
        Path(f"{said}.{name}").touch()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            child(case, rank, said)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    ended, told = 0, False
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        others = said.parent.glob(f"{case['name']}.*.status")
        if not ended and not told and any(path.read_text() not in ("", "0") for path in others):
            os.kill(pid, signal.SIGTERM)
            told = True
        time.sleep(0.01)
    said.with_name(f"{said.name}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    gc.freeze()  # else a child's first collection looks at, and so copies, all that was imported
    for case in json.loads((folder / "cases.json").read_text()):
        run(case, rank, folder / f"{case['name']}.{rank}")
