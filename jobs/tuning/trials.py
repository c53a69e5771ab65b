"""The runs of a study: each trial one, and those in which the best settings must beat the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.runs.loop import PrunedRunError, Watch
from jobs.training.train import train
from jobs.tuning.space import told
from jobs.tuning.study import SharedStudy
from runtime.console import say
from runtime.errors import UsageError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import Run
from runtime.training.steps import NonFiniteError


@dataclass(frozen=True)
class Fixed:
    """What all runs of a study have in common: its folder, and the settings that were given."""

    folder: Path
    given: Mapping[str, Any]

    def resolved(self, params: Mapping[str, Any], **more: Any) -> Resolved:
        """The settings of a run with these params, all others as given or default."""
        values = {**self.given, "use_lora": True} | dict(params) | more
        return Resolved(Settings.from_dict(values), dict.fromkeys(map(str.upper, values), "tune.py"))

    def run(self, name: str, params: Mapping[str, Any], watch: Watch = lambda step, loss: "", **more: Any) -> Run:
        """Train a run of this study, or go on with it; what it prints goes into a file of the study's folder."""
        name = f"{self.folder.name}-{name}"
        with open(self.folder / f"{name}.txt", "a", encoding="utf-8") as file, redirect_stdout(file):
            return train(self.resolved(params, run_name=name, **more), watch=watch)


def search(study: SharedStudy, fixed: Fixed, count: int) -> None:
    """Run trials until there are `count`, those of other processes included.

    What stops the command leaves its trial to whoever goes on with the study. Raises UserError as a run does.
    """
    while True:
        with study.next_trial(count) as trial:
            if trial is None:
                return
            params = study.params(trial)
            say(f"Trial {trial.number + 1} of {count}: {told(params)}")

            def watch(step: int, loss: float, trial=trial) -> str:
                return "its loss is above the median of the trials before it" if study.report(trial, step, loss) else ""

            try:
                run = fixed.run(f"{trial.number:03d}", params, watch)
            except PrunedRunError as error:
                say(f"Pruned: {error}")
                study.tell(trial, None, pruned=True)
            except NonFiniteError as error:
                say(f"Failed: {error}")
                study.tell(trial, None)
            except UsageError:  # no trial with these settings can be
                study.tell(trial, None)
                raise
            else:
                study.tell(trial, run.result["best"])


def final(fixed: Fixed, best: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, list[float]]:
    """The losses over all that is held out, of the best settings and of the defaults, with seeds that no trial had:
    the best of many trials was lucky too."""
    sides: dict[str, Mapping[str, Any]] = {"best": best, "default": {}}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i, seed in enumerate(seeds):
        for name, params in sides.items():
            say(f"{name.capitalize()} settings, seed {seed} ({i + 1} of {len(seeds)})")
            found[name].append(fixed.run(f"{name}-{seed}", params, seed=seed).result["val_loss"])
    return found
