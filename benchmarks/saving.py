"""What saving costs: a resumable step against plain files of the same bytes, and its share of a default run's time.

python -m benchmarks.saving                          0.8M, 3.2M and 10.7M parameters, all weights and LoRA

A plain write opens each file anew, writes it and syncs it, over what the last round left there; a save syncs folders
and a manifest too, renames, and removes the save before the last two.

The share is reckoned, as a default run takes minutes: a training run with default settings and a save and an
evaluation every 10 of its 60 steps tells, in medians, how long a step, a save, an evaluation and keeping the best
weights take here. A default run's steps take that long MAX_ITERS times, all else as often as its intervals say, with
the best weights kept at every evaluation, which is the most there can be. Its start and its end, where nothing is
saved, are left out of the whole.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from benchmarks.runs import RUNS
from jobs.comparing.timing import repeatable
from jobs.runs.job import Job, prepare
from jobs.runs.loop import Training
from runtime.device import Machine, pick_machine
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import Run, claim
from runtime.training.metrics import read_metrics
from runtime.training.resume import State, to_files
from runtime.training.steps import Stepper

ROWS = (  # (contestant, what it says, goal)
    ("save", "a save / plain files of these bytes", 2.0),
    ("whole save", "making the bytes and saving / plain files", None),
)
STEPS, INTERVAL = 60, 10  # of the run that the share is reckoned from
TINY = {"test_mode": True, "n_layer": 1, "n_embd": 32, "block_size": 16, "batch_size": 4, "eval_iters": 2}


def stepped(size: tuple[int, ...], lora: bool, machine: Machine) -> Stepper:
    """A stepper after one step, so that its optimizer has something to save."""
    stepper = repeatable(peers.ours(size, lora), torch.zeros(1, size[-1] + 1, dtype=torch.long), machine)
    stepper.step(0)
    return stepper


def write_plainly(folder: Path, files: dict[str, bytes]) -> None:
    """What anybody would do who wants these files on the disk."""
    for name, data in files.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def contestants(folder: Path, stepper: Stepper) -> dict[str, Callable[[], object]]:
    """A plain write, and saves into a run's folder with the bytes at hand or not."""
    files, numbers = {name: bytes(data) for name, data in to_files(stepper, State()).items()}, itertools.count(1)
    run = Run(folder / "run", {})
    for path in (folder / "plain", run.folder):
        path.mkdir()
    return {
        "plain": lambda: write_plainly(folder / "plain", files),
        "save": lambda: run.save("step", next(numbers), files, keep=2),
        "whole save": lambda: run.save("step", next(numbers), to_files(stepper, State()), keep=2),
    }


def measure(size: str, kind: str, rounds: int, device: str, where: Path) -> list[dict]:
    """The rows of one size, with all weights or with LoRA."""
    machine = pick_machine(device, "auto")
    stepper = stepped(SIZES[size], kind == "LoRA", machine)
    megabytes = sum(map(len, to_files(stepper, State()).values())) / 1e6
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seconds = take_turns(contestants(Path(folder), stepper), rounds, machine)
    gc.collect()
    return [
        {"what": f"{size}, {kind}, {megabytes:.1f} MB: {what}", "size": size, "kind": kind}
        | ratio(seconds, one, "plain")
        | {"goal": goal, "seconds": statistics.median(seconds[one])}
        for one, what, goal in ROWS
    ]


def real_run(values: dict, folder: str) -> dict[str, list[float]]:
    """The seconds of each step, evaluation and save of a training run."""
    spent = defaultdict(list)
    values = values | {"max_iters": STEPS, "eval_interval": INTERVAL, "save_interval": INTERVAL}
    values |= {"checkpoints_dir": folder, "run_name": "saving"}
    given = Resolved(Settings.from_dict(values), {})
    job = prepare(given, pick_machine(given.settings.device, given.settings.dtype), None)
    run = claim(Path(folder), job.plain_name, given.settings.run_name, job.metadata(), fresh=False)
    clocked = ((Job, "evaluate"), (Training, "evaluate"), (Training, "save"))
    with ExitStack() as stack:
        for owner, name in clocked:
            call = timed(getattr(owner, name), spent[f"{owner.__name__}.{name}"])
            stack.enter_context(mock.patch.object(owner, name, call))
        Training(job, run, job.stepper()).all_steps()
    lines = [line for line in read_metrics(Path(folder) / "saving/metrics.jsonl") if "seconds" in line]
    for before, line in itertools.pairwise(lines):
        spent["step"].append((line["seconds"] - before["seconds"]) / (line["step"] - before["step"]))
    return spent


def timed(method: Callable, seconds: list[float]) -> Callable:
    """The method, with how long each call takes added to `seconds`."""

    def called(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return called


def share(values: dict, where: Path) -> float:
    """Percent of a whole run with these settings that saving takes; see above."""
    settings = Settings.from_dict(values)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        spent = real_run(values, folder)
    evaluations, saves = (settings.max_iters // every for every in (settings.eval_interval, settings.save_interval))
    score = statistics.median(spent["Job.evaluate"])
    best = statistics.median(spent["Training.evaluate"]) - score
    saving = saves * statistics.median(spent["Training.save"]) + evaluations * best
    return 100 * saving / (saving + evaluations * score + settings.max_iters * statistics.median(spent["step"]))


def measure_share(rounds: int, values: dict, where: Path) -> dict:
    """The row of the share; a run each round."""
    found = [share(values, where) for _ in range(rounds)]
    what, goal = ("a tiny", None) if values.get("test_mode") else ("a default", 2.0)
    about = {"median": statistics.median(found), "min": min(found), "max": max(found), "goal": goal}
    return {"what": f"saving's share of the time of {what} run, in percent"} | about


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=9)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "3.2M", "10.7M"])
    flags.add_argument("--data-dir", type=Path, default=Path("data") / "cache")
    flags.add_argument("--folder", type=Path, default=RUNS, help="where to save, which tells on which disk")
    options = flags.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    values = {"data_dir": str(options.data_dir), "device": options.device} | (TINY if options.sizes == ["tiny"] else {})
    rows = []
    for size, kind in itertools.product(options.sizes, ("all weights", "LoRA")):
        rows += (found := measure(size, kind, options.rounds, options.device, options.folder))
        tell(found)
    rows.append(measure_share(max(1, options.rounds // 3), values, options.folder))
    tell(rows[-1:])
    close("saving", rows, options.record)


if __name__ == "__main__":
    run_command(main)
