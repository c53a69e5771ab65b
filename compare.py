"""Compare full fine-tuning with LoRA: one base, the same batches, steps in turn, everything measured here.

python compare.py                        full against LoRA of ranks 4, 8, 16 and 32, on the First Folio
python compare.py --ranks 8 --targets minimal --targets all --max-iters 300
python compare.py --variants all         every kind of adapter, with three seeds
python compare.py --sweep                from which width, rank and batch on a LoRA step is the faster one here
TEST_MODE=True python compare.py         a quick look at either
"""

from __future__ import annotations

import runtime.start  # before all that may be missing
from jobs.comparing.options import Options, check_flags
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_flags(given)
    with runtime.start.importing():
        from jobs.comparing.command import run
    run(given)


if __name__ == "__main__":
    run_command(main)
