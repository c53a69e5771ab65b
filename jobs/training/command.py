"""What `training.py` does: trains, or tells what that would take."""

from __future__ import annotations

from jobs.exporting.pushing import Pushing
from jobs.runs import fitting
from jobs.runs.footprint import footprint
from jobs.summaries.memory import summary_of_memory
from jobs.summaries.result import print_next
from jobs.training.train import begin, train
from runtime.console import say
from runtime.settings.sources import Resolved


def run(given: Resolved) -> None:
    """Train a run and push it where that is asked for, or with --dry-run tell how much memory it would take."""
    if given.settings.dry_run:
        dry_run(given)
        return
    pushing = Pushing(given.settings)
    made = train(given, pushing)
    pushing.end(made)
    print_next(made)


def dry_run(given: Resolved) -> None:
    """Print how much memory a run would take. Raises UserError where it would be refused."""
    settings, (machine, base) = given.settings, begin(given)
    if settings.adapting and not base:
        say(f"There is no trained base in {settings.checkpoints_dir} yet; this is for the one that comes first")
    plan, free = fitting.plan_with_batch(given, machine, base)
    found = footprint(plan)
    print(summary_of_memory(plan, found, fitting.free_told(free)))
    fitting.check_fits(plan, found, free, settings.force)
