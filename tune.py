"""Search for good LoRA settings: many runs, poor ones stopped early, and a last word on whether the best is any better.

python tune.py                              20 trials over rank, alpha, dropout, learning rate, targets and kind
python tune.py --ranks 4,8,16 --learning-rates 1e-4..1e-2 --trials 40 --dataset my.jsonl
python tune.py --lora-rank 8                what is given is fixed, as is every other setting of training.py
python tune.py --jobs 2                     as two processes on one study
TEST_MODE=True python tune.py               a quick look
The same command goes on with a study that was stopped, and redoes nothing.
"""

from __future__ import annotations

import runtime.start  # before all that may be missing
from jobs.tuning.options import Options, check_flags, searched_space
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_flags(given)
    space = searched_space(given)
    with runtime.start.importing():
        from jobs.tuning.command import run
    run(given, space)


if __name__ == "__main__":
    run_command(main)
