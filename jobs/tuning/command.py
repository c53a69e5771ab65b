"""What `tune.py` does: a study of LoRA settings, and what it came to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.runs.base import base_settings, find_base
from jobs.runs.job import command_of
from jobs.training.train import train
from jobs.tuning.options import Options, fixed_settings
from jobs.tuning.plots import draw_study
from jobs.tuning.report import finished, importances, table, verdict
from jobs.tuning.space import Values, short, told
from jobs.tuning.study import SharedStudy, check_optuna
from jobs.tuning.trials import Fixed, final, search
from runtime.console import say
from runtime.errors import UserError
from runtime.interrupt import InterruptedRunError
from runtime.pictures import save_picture
from runtime.settings.config import SHAPE
from runtime.settings.sources import Resolved
from runtime.start import ROOT, command_line
from runtime.storage import folders
from runtime.storage.encoding import to_json
from runtime.storage.runs import Run


def base_for(given: Resolved) -> Run:
    """The base of all runs, which is trained first where there is none."""
    if base := find_base(given.settings, [name for name in SHAPE if given.explicit(name)]):
        return base
    say(f"There is no trained base in {given.settings.checkpoints_dir} yet: training it first")
    return train(base_settings(given))


@contextmanager
def further_processes(jobs: int) -> Iterator[None]:
    """Further processes with the same command, each with its share of the cores. They get no Ctrl-C of their own, and
    are asked to stop when this one stops."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if jobs > 1:
        import torch

        torch.set_num_threads(min(threads, torch.get_num_threads()))
    words = [sys.executable, str(ROOT / "tune.py"), *sys.argv[1:], "--jobs", "1", "--only-trials"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    how = {"env": env, "stdout": subprocess.DEVNULL, "start_new_session": True}
    started = [subprocess.Popen(words, **how) for _ in range(jobs - 1)]
    try:
        yield
    except BaseException:
        for process in started:
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        for process in started:
            process.wait()


def conclude(study: SharedStudy, base: Run, fixed: Fixed, seeds: Sequence[int]) -> None:
    """Table, importances, picture, the command of the best run, and with some seeds whether it beats the defaults."""
    trials, found = study.trials(), importances(study)
    if not (done := finished(trials)):
        raise UserError("no trial took all its steps; lower --learning-rates, or begin another --study")
    best = done[0]
    print(table(trials, study.folder.name))
    if found:
        print(f"What mattered: {', '.join(f'{short(name)} {100 * part:.0f} %' for name, part in found.items())}")
    title = f"{study.folder.name}: best {best.value:.4f} with {told(best.params)}"
    if save_picture(study.folder / "study.png", draw_study, study.space, trials, found, title):
        print(f"Picture: {study.folder / 'study.png'}")
    here = base.folder.parent.resolve() == study.folder.parent.resolve()
    again = command_of(fixed.resolved(best.params).settings, base.name if here else str(base.folder))
    print(f"The best run again: {again}", flush=True)
    if seeds:
        losses = final(fixed, best.params, seeds)
        print(verdict(best.params, losses))
        folders.write_file(study.folder / "final.json", to_json({"best": best.params, "losses": losses}))


def run(given: Resolved, space: list[Values]) -> None:
    """What `tune.py` does."""
    check_optuna()
    options: Options = given.settings
    base = base_for(given)
    folder = Path(options.checkpoints_dir) / f"tune-{options.study}"
    fixed = Fixed(folder, fixed_settings(given) | {"base": str(base.folder)})
    default = fixed.resolved({}).settings
    searched = {values.name for values in space}
    asked = {name: value for name, value in default.identity().items() if name not in searched}
    study = SharedStudy(folder, space, asked | {"base": base.name, "test_mode": default.test_mode})
    say(f"Searching {'; '.join(f'{v.name.upper()}={v}' for v in space)} on {base.name}; the study is in {folder}")
    try:
        with further_processes(options.jobs):
            search(study, fixed, options.trials)
        if not options.only_trials:
            conclude(study, base, fixed, range(options.seed + 1, options.seed + 1 + options.seeds))
    except (InterruptedRunError, KeyboardInterrupt):
        if not options.only_trials:
            done = sum(trial.state.is_finished() for trial in study.trials())
            again = command_line("tune.py", *sys.argv[1:])
            say(f"\n{done} of {options.trials} trials are finished; to go on: {again}")
        raise
