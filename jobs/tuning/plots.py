"""The picture of a study."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.tuning.space import Values, short, shown
from runtime.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

DONE, PRUNED = "#1f6f8b", "#bbbbbb"


def draw_study(
    space: Sequence[Values], trials: Sequence[FrozenTrial], importances: Mapping[str, float], title: str
) -> Figure:
    """The loss of each trial over each setting that was searched, and how much each explains. Pruned trials are grey,
    where they were stopped; the best is circled."""
    columns = min(4, len(space) + 1)
    rows = -(-(len(space) + 1) // columns)
    figure = new_figure(textwrap.fill(title, 30 * columns), (3.2 * columns, 0.6 + 2.9 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    stopped = [trial for trial in trials if trial.state.name == "PRUNED" and trial.intermediate_values]
    best = min(done, key=lambda trial: trial.value)
    for axes, values in zip(panels, space, strict=False):
        place = None if values.is_range else {value: float(i) for i, value in enumerate(values.values)}

        def x(trial: FrozenTrial, values: Values = values, place: Mapping | None = place) -> float:
            return trial.params[values.name] if place is None else place[trial.params[values.name]]

        last = [list(trial.intermediate_values.values())[-1] for trial in stopped]
        axes.scatter([x(trial) for trial in stopped], last, s=14, c=PRUNED, label="pruned")
        axes.scatter([x(trial) for trial in done], [trial.value for trial in done], s=18, c=DONE)
        axes.scatter([x(best)], [best.value], s=90, facecolors="none", edgecolors="black")
        if place is not None:
            axes.set_xticks(list(place.values()), [shown(value) for value in place])
            axes.set_xlim(-0.5, len(place) - 0.5)
        elif values.by_factors:
            low, high = values.values
            axes.set_xscale("log")
            axes.minorticks_off()
            ticks = [low, (low * high) ** 0.5, high]
            axes.set_xticks(ticks, [shown(tick) for tick in ticks])
            axes.set_xlim(low * 0.9, high * 1.1)
        axes.set_xlabel(short(values.name))
        axes.set_ylabel("validation loss")
        axes.grid(alpha=0.3)
    if importances:
        names = list(importances)[::-1]
        panels[len(space)].barh([short(name) for name in names], [importances[name] for name in names], color=DONE)
        panels[len(space)].set_xlabel("importance")
    for axes in panels[len(space) + bool(importances) :]:
        axes.set_axis_off()
    return figure
