"""What a study came to: a table, what mattered, and whether the best settings beat the defaults."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.tuning.space import short, shown, told
from jobs.tuning.study import SharedStudy
from runtime import report

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SHOWN = 10  # trials of the table


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that took all their steps, the best first."""
    return sorted((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)


def table(trials: Sequence[FrozenTrial], prefix: str) -> str:
    """The best trials, and how the others ended."""
    done = finished(trials)
    rows = [["run", "loss", *map(short, done[0].params)]]
    for trial in done[:SHOWN]:
        rows.append([f"{prefix}-{trial.number:03d}", f"{trial.value:.4f}", *map(shown, trial.params.values())])
    ended = [f"{len(done)} took all their steps"]
    for state, word in (("PRUNED", "pruned"), ("FAIL", "failed"), ("RUNNING", "not finished")):
        if count := sum(trial.state.name == state for trial in trials):
            ended.append(f"{count} {word}")
    return f"{report.table(rows)}\nOf {len(trials)} trials {', '.join(ended)}."


def importances(study: SharedStudy) -> dict[str, float]:
    """How much of what makes a trial a good one each setting explains, from 0 to 1, by PED-ANOVA (Watanabe et al. 2023,
    arXiv 2304.10255); empty where the trials are too few or too alike to say."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so it says that they are too few
        try:
            return get_param_importances(study.study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, Warning):
            return {}


def verdict(best: Mapping[str, Any], losses: Mapping[str, Sequence[float]]) -> str:
    """Whether the best settings beat the defaults by more than seeds differ, in words."""
    means = {name: statistics.mean(values) for name, values in losses.items()}
    spread = max(max(values) - min(values) for values in losses.values())
    gain = means["default"] - means["best"]
    sides = [f"{name} {means[name]:.4f} ({min(v):.4f} to {max(v):.4f})" for name, v in losses.items()]
    said = f"Loss over all held-out data with {len(losses['best'])} new seeds each: {', '.join(sides)}."
    if gain > spread:
        return f"{said}\nThe best settings beat the defaults by {gain:.4f}, more than seeds differ ({spread:.4f})."
    if gain < -spread:
        return f"{said}\nThe defaults are better by {-gain:.4f}, more than seeds differ ({spread:.4f}): keep them."
    return f"{said}\nNo winner: they differ by {abs(gain):.4f}, and seeds by up to {spread:.4f} ({told(best)})."
