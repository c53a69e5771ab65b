"""Train a small GPT on all its weights, or adapt a trained one with LoRA.

python training.py                          train a base on Shakespeare
USE_LORA=True python training.py            adapt it to the First Folio's spelling (or: python training.py --use-lora)
BASE=base-shakespeare python training.py    fine-tune all its weights on the Folio instead
TEST_MODE=True python training.py           any of these as a quick run
python training.py --dry-run                tell how much memory it would take, and train nothing
"""

from __future__ import annotations

import runtime.start  # before all that may be missing
from runtime.processes.command import run_command
from runtime.settings.config import Settings, from_command_line


def main() -> None:
    """Run the command."""
    given = from_command_line(Settings, __doc__)
    with runtime.start.importing():
        from jobs.training.command import run
    run(given)


if __name__ == "__main__":
    run_command(main, many=True)
