"""Train a small GPT on all its weights, or adapt a trained one with LoRA.

python training.py                          train a base on Shakespeare
USE_LORA=True python training.py            adapt it to the First Folio's spelling (or: python training.py --use-lora)
BASE=base-shakespeare python training.py    fine-tune all its weights on the Folio instead
TEST_MODE=True python training.py           any of these as a quick run
python training.py --dry-run                tell how much memory it would take, and train nothing
"""

from __future__ import annotations

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.exporting.pushing import Pushing
from jobs.runs import fitting
from jobs.runs.footprint import footprint
from jobs.summaries.memory import summary_of_memory
from jobs.summaries.result import print_next
from jobs.training.train import begin, train
from runtime.console import say
from runtime.processes.command import run_command
from runtime.settings.config import Settings, from_command_line
from runtime.settings.sources import Resolved


def dry_run(given: Resolved) -> None:
    """Print how much memory a run would take. Raises UserError where it would be refused."""
    settings, (machine, base) = given.settings, begin(given)
    if settings.adapting and not base:
        say(f"There is no trained base in {settings.checkpoints_dir} yet; this is for the one that comes first")
    plan, free = fitting.plan_with_batch(given, machine, base)
    found = footprint(plan)
    print(summary_of_memory(plan, found, fitting.free_told(free)))
    fitting.check_fits(plan, found, free, settings.force)


def main() -> None:
    """Run the command."""
    given = from_command_line(Settings, __doc__)
    if given.settings.dry_run:
        dry_run(given)
    else:
        pushing = Pushing(given.settings)
        run = train(given, pushing)
        pushing.end(run)
        print_next(run)


if __name__ == "__main__":
    run_command(main, many=True)
