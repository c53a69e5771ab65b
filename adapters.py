"""Look at adapters, check them, merge and combine them, and bring them in from PEFT.

python adapters.py list                           every run and adapter there is
python adapters.py inspect lora-folio-r8          how much each module changes: a table and a picture
python adapters.py diff lora-folio-r8 other       how alike two adapters' changes are
python adapters.py strength lora-folio-r8         what the adapter gains on its text and loses on the base's
python adapters.py merge lora-folio-r8 --out folio                        a model that needs no adapter
python adapters.py quantize base-shakespeare --out small                  a base whose files are in 4 bits
python adapters.py combine lora-folio-r8 other --weights 0.5,0.5 --out both
python adapters.py check checkpoints/lora-folio-r8                        everything that can be wrong with files
python adapters.py import folder --base base-shakespeare --out name       a folder that PEFT wrote
python adapters.py remove folio both --yes         runs that are no longer needed

python adapters.py COMMAND --help tells what each takes. To PEFT, vLLM, llama.cpp and others: export.py.
"""

from __future__ import annotations

import inspect
import sys

import runtime.start  # before all that may be missing
from jobs.adapting.options import COMMANDS
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line
from runtime.settings.flags import subcommand


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] == ["export"]:
        instead = runtime.start.command_line("export.py", "NAME", "--to", "peft", "--out", "FOLDER")
        raise UsageError(f"export is a command of its own: {instead}")
    word = subcommand(sys.argv[1:], COMMANDS, __doc__)
    options = from_command_line(COMMANDS[word], inspect.getdoc(COMMANDS[word]), word).settings
    options.check()
    with runtime.start.importing():
        from jobs.adapting.command import run
    run(options)


if __name__ == "__main__":
    run_command(main)
