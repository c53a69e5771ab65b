"""Search for good LoRA settings: many runs, poor ones stopped early, and a last word on whether the best is any better.

python tune.py                              20 trials over rank, alpha, dropout, learning rate, targets and kind
python tune.py --ranks 4,8,16 --learning-rates 1e-4..1e-2 --trials 40 --dataset my.jsonl
python tune.py --lora-rank 8                what is given is fixed, as is every other setting of training.py
python tune.py --jobs 2                     as two processes on one study
TEST_MODE=True python tune.py               a quick look
The same command goes on with a study that was stopped, and redoes nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.runs.base import base_settings, find_base
from jobs.runs.job import command_of
from jobs.training.train import train
from jobs.tuning.plots import draw_study
from jobs.tuning.report import finished, importances, table, verdict
from jobs.tuning.space import SEARCHED, short, space_of, told
from jobs.tuning.study import SharedStudy, check_optuna
from jobs.tuning.trials import Fixed, final, search
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.interrupt import InterruptedRunError
from runtime.pictures import save_picture
from runtime.processes.command import run_command
from runtime.settings.config import NAME, NAMED, PRESETS, SHAPE, Settings, from_command_line
from runtime.settings.fields import setting, settings_of
from runtime.settings.sources import Resolved
from runtime.start import ROOT, command_line
from runtime.storage import folders
from runtime.storage.encoding import to_json
from runtime.storage.runs import Run

TUNED = "What to search, and how long"
VALUES = {"group": TUNED, "env": False}
INSTEAD = {  # flags of training.py that a study would ignore: what to do instead
    "use_lora": "it searches settings of LoRA",
    "run_name": "its runs are named after --study",
    "fresh": "another --study begins anew",
    "dry_run": "training.py tells it, of one run",
    **dict.fromkeys(("push_to_hub", "push_strategy", "push_private"), "export.py --push does it, of one run"),
}


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The flags of tune.py, beside all settings of a training run, which are fixed where they are given."""

    presets: ClassVar = PRESETS | {"TEST_MODE": PRESETS["TEST_MODE"] | {"trials": 4}}

    study: str = setting(
        "lora", "Name of the study, and of its runs: tune-STUDY-NUMBER", **VALUES, pattern=NAME, allowed=NAMED
    )
    trials: int = setting(20, "Number of trials, those of all processes together", **VALUES, low=1, high=10**5)
    jobs: int = setting(
        1, "Number of processes that share the study, and this machine's cores", **VALUES, low=1, high=256
    )
    seeds: int = setting(
        3, "Seeds with which the best settings and the defaults are trained at the end; 0 compares nothing",
        **VALUES, low=0, high=100,
    )  # fmt: skip
    only_trials: bool = setting(
        False, "Run trials and show nothing at the end, as a further process on a study of this name", **VALUES
    )
    ranks: str = setting("4,8,16,32", "Values of LORA_RANK: a list, or a range as 4..64", **VALUES)
    alphas: str = setting("8,16,32", "Values of LORA_ALPHA, likewise", **VALUES)
    dropouts: str = setting("0,0.05,0.1", "Values of LORA_DROPOUT, likewise", **VALUES)
    learning_rates: str = setting(
        "", "Values of LEARNING_RATE, likewise; by default from an eighth of its default to four times that", **VALUES
    )
    targets: str = setting("minimal,standard,all", "Presets of LORA_TARGETS", **VALUES)
    variants: str = setting("lora,rslora,dora", "Kinds of LORA_VARIANT", **VALUES)

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """A study adapts a base with LoRA, whether or not USE_LORA says so."""
        return super().active(dict(values) | {"use_lora": True})


def check_flags(given: Resolved) -> None:
    """Raises UsageError for a flag that a study would ignore; in the environment it may be meant for others."""
    for name, instead in INSTEAD.items():
        if given.sources.get(name.upper(), "").startswith("flag"):
            raise UsageError(f"tune.py does not take --{name.replace('_', '-')}: {instead}")


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


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_flags(given)
    check_optuna()
    options: Options = given.settings
    explicit = {row.name: getattr(options, row.name) for row in settings_of(Settings) if given.explicit(row.name)}
    own = {row.name for row in settings_of(Options) if given.explicit(row.name)}
    texts = {flag: getattr(options, flag) for flag in SEARCHED}
    space = space_of(texts, own, set(explicit), options.learning_rate)
    base = base_for(given)
    fixed = Fixed(Path(options.checkpoints_dir) / f"tune-{options.study}", explicit | {"base": str(base.folder)})
    default = fixed.resolved({}).settings
    searched = {values.name for values in space}
    asked = {name: value for name, value in default.identity().items() if name not in searched}
    study = SharedStudy(fixed.folder, space, asked | {"base": base.name, "test_mode": default.test_mode})
    say(f"Searching {'; '.join(f'{v.name.upper()}={v}' for v in space)} on {base.name}; the study is in {fixed.folder}")
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


if __name__ == "__main__":
    run_command(main)
