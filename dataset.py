"""Look at records of instructions or chats, check them, mend, split and convert them.

python dataset.py look pairs.jsonl                     columns, lengths, three records as a model is given them
python dataset.py lint pairs.jsonl                     what breaks the rules of good data, with the worst examples
python dataset.py lint pairs.jsonl --strict            the same, with status 1 if anything does
python dataset.py clean pairs.jsonl --out clean.jsonl  copies, boilerplate, URLs and white space mended, and counted
python dataset.py split pairs.jsonl --out folder       into folder/train.jsonl, validation.jsonl and test.jsonl
python dataset.py convert pairs.csv --out chats.jsonl --form messages

Files are what DATASET takes: .jsonl, .json, .csv or .parquet, several with commas, a folder, folio-pairs, or the name
of a data set on the Hugging Face hub. No file is changed, and none overwritten. python dataset.py COMMAND --help tells
what each takes.
"""

from __future__ import annotations

import inspect
import sys

import runtime.start  # before all that may be missing
from jobs.looking.options import COMMANDS
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line
from runtime.settings.flags import subcommand


def main() -> None:
    """Run the command."""
    word = subcommand(sys.argv[1:], COMMANDS, __doc__)
    options = from_command_line(COMMANDS[word], inspect.getdoc(COMMANDS[word]), word).settings
    options.check()
    with runtime.start.importing():
        from jobs.looking.command import run
    run(options)


if __name__ == "__main__":
    run_command(main)
