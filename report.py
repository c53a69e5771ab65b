"""A report on a run, or on several side by side: one HTML file that opens anywhere, with nothing to install.

python report.py lora-folio-r8                     lora-folio-r8-report.html
python report.py lora-folio-r8 dora-folio-r8       both, their curves in one chart, and the settings that differ
python report.py lora-folio-r8 --md --png          Markdown and pictures as well
python report.py lora-pairs-r16 --evaluation answers       with the scorecard of evaluate.py --out answers
python report.py lora-folio-r8 --no-measure        at once: only what is in the run's files

It measures what no file says, in some seconds: what each linear learned, what is forgotten, what is wrong with records.
"""

from __future__ import annotations

import runtime.start  # before all that may be missing
from jobs.reporting.options import Options, check_flags
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings
    check_flags(options)
    with runtime.start.importing():
        from jobs.reporting.command import run
    run(options)


if __name__ == "__main__":
    run_command(main)
