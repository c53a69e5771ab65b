"""However one of several processes ends, all end: with one line that says why, the last save intact, nobody left.

One run of two processes is struck again and again; each start goes on from what the one before it saved.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from os import kill, killpg
from pathlib import Path

import pytest
import torch.distributed as dist
from starts import ODD, ROOT, TEXT, TINY, TRACEBACK, Started, of_ours

from runtime.processes.launch import Launch
from runtime.processes.world import World
from runtime.storage.folders import read_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux is needed")
SOAK = bool(os.environ.get("SOAK"))
LONG = (*TINY, "--dataset=text.txt", "--dtype=fp32", "--batch-size=4", "--step-parts=2", "--run-name=long")
LONG += ("--max-iters=1000000", "--warmup-iters=5", "--save-interval=10", "--eval-interval=1000000")
SAVED = r"stopped after step (\d+), which is saved; the same command goes on there"
LOST = r"error: lost another process, which was killed or failed, or whose network is gone, at step (\d+); the same "
LOST += r"command goes on after step (\d+)"
SILENT = r"error: another process has not answered for COLLECTIVE_TIMEOUT=5 seconds, at step (\d+); the same command "
SILENT += r"goes on after step (\d+)"


@dataclass(frozen=True)
class Ending:
    """A way to end.

    strike: what happens to a run that is under way. line: what it says then, with the step that it speaks of and the
    last one saved. words: added to the command. status: torchrun's, which makes 1 of whatever is not 0. soak: takes
    long, or shows little more than the others.
    """

    strike: Callable[[Started], object]
    line: str
    words: tuple[str, ...] = ()
    status: int = 1
    soak: bool = False


ENDINGS = {
    "the first process is killed": Ending(lambda run: kill(run.workers[0], signal.SIGKILL), LOST),
    "another process is killed": Ending(lambda run: kill(run.workers[1], signal.SIGKILL), LOST),
    "torchrun gets SIGTERM": Ending(lambda run: kill(run.agent.pid, signal.SIGTERM), SAVED),
    "torchrun is killed": Ending(lambda run: kill(run.agent.pid, signal.SIGKILL), SAVED, status=-signal.SIGKILL),
    "Ctrl-C": Ending(lambda run: killpg(run.agent.pid, signal.SIGINT), SAVED),
    "one process gets SIGTERM": Ending(lambda run: kill(run.workers[1], signal.SIGTERM), SAVED, soak=True),
    "one process stands still": Ending(
        lambda run: kill(run.workers[1], signal.SIGSTOP),
        SILENT,
        words=("--collective-timeout=5",),
        soak=True,  # torchrun gives the one that stands still another 30 seconds
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    (root / "text.txt").write_text(TEXT)
    return root


def newest(run: Path) -> int:
    """The newest step that is saved, 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("step-*")), default=0)


@pytest.mark.parametrize("name", [name for name, ending in ENDINGS.items() if SOAK or not ending.soak])
def test_however_a_process_ends_all_end_with_one_line_and_the_run_goes_on(folder, name):
    ending, saves = ENDINGS[name], folder / "checkpoints" / "long"
    before = newest(saves)
    run = Started(folder, 2, ROOT / "training.py", *LONG, *ending.words)
    run.wait_until(lambda: newest(saves) > before)
    ending.strike(run)
    told = run.end()
    print(f"\n{name}: {run.took:.1f} s, status {run.agent.returncode}: {of_ours(told)}")
    (line,) = of_ours(told)
    match = re.fullmatch(ending.line, line)
    assert match, line
    last = newest(saves)
    assert int(match.groups()[-1]) == last and int(match[1]) >= last > before
    assert read_folder(saves / f"step-{last:06d}")
    assert run.agent.returncode == ending.status
    if before:
        assert f"Going on with long after step {before} of 1000000" in told


def test_a_bug_in_one_process_ends_all_with_its_traceback_alone(folder):
    (folder / "odd.py").write_text(ODD.format(root=str(ROOT), rank="1", error="ValueError('a bug')"))
    run = Started(folder, 2, "odd.py", *LONG, "--run-name=odd")
    told = run.end(90)
    assert of_ours(told) == []
    (ours,) = [part for part in told.split(TRACEBACK)[1:] if "ValueError: a bug" in part]
    assert "/runtime/processes/command.py" in ours
    assert newest(folder / "checkpoints/odd") == 10 and read_folder(folder / "checkpoints/odd/step-000010")


def test_one_process_speaks_and_the_others_wait_for_it():
    store = dist.HashStore()
    worlds = [World(Launch(rank, 3), store) for rank in range(3)]
    assert worlds[2].speaks()
    worlds[2].said()
    assert not worlds[0].speaks() and not worlds[1].speaks()


def test_where_what_they_share_has_gone_with_the_first_process_or_torchrun_one_speaks_all_the_same():
    class Gone:
        def add(self, *_):
            raise RuntimeError("Broken pipe")

    for torchrun in (False, True):
        worlds = [World(Launch(rank, 4, torchrun=torchrun), Gone()) for rank in range(4)]
        assert [world.rank for world in worlds if world.speaks()] == [0 if torchrun else 1]
