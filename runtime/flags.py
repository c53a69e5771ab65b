"""The command line: one argparse flag for each setting of a table, with the table's help."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from runtime.errors import UsageError
from runtime.fields import Setting, Table, in_words, settings_of
from runtime.listing import PRECEDENCE, explained, groups, other_defaults

PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", tuple: "TEXT", bool: "BOOL"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are a UsageError: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise UsageError(f"{message.removeprefix('argument ')}; --help lists all flags")


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = min(100, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=columns)


def make_parser(cls: type[Table], prog: str, description: str) -> Parser:
    """A parser that leaves every value as text, and absent what was not given."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--setting value ...]",
        description=description,
        epilog=textwrap.fill(f"Where a setting is given twice, {PRECEDENCE}", 100),
        formatter_class=_formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, rows in groups(cls).items():
        group = parser.add_argument_group(title)
        for row in rows:
            _add_flag(group, row)
    return parser


def _add_flag(group: argparse._ArgumentGroup, row: Setting) -> None:
    options: dict[str, Any] = {"action": "append" if row.kind is tuple else "store"}
    if row.kind is bool:  # `--use-lora`, `--use-lora False` and `--no-use-lora`, all as text
        options |= {"nargs": "?", "const": "true"}
        off = "--no-" + row.flag.removeprefix("--")
        group.add_argument(off, dest=row.name, action="store_const", const="false", help=argparse.SUPPRESS)
    text = f"{explained(row)} {_default(row)}".replace("%", "%%")
    group.add_argument(row.flag, dest=row.name, metavar=PLACEHOLDERS[row.kind], help=text, **options)


def _default(row: Setting) -> str:
    others = other_defaults(row)
    name = row.variable if row.rule.env else "Default"
    return f"[{name}={in_words(row.default)}{f'; {others}' if others else ''}]"


def read_flags(cls: type[Table], argv: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """The text given for each setting that has a flag in `argv`; `--lora_rank` is `--lora-rank`.

    Raises UsageError for an unknown flag, with the one that was meant, and SystemExit after printing --help.
    """
    words = [_with_dashes(word) for word in argv]
    found, unknown = make_parser(cls, prog, description).parse_known_args(words)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0], {row.flag: row for row in settings_of(cls)}))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}


def _with_dashes(word: str) -> str:
    name, equals, text = word.partition("=")
    return name.replace("_", "-") + equals + text if name.startswith("--") else word


def _unknown_flag(word: str, rows: Mapping[str, Setting]) -> str:
    asked = "--" + word.partition("=")[0].strip("-").replace("_", "-").lower()
    close = difflib.get_close_matches(asked, rows, n=1, cutoff=0.75)
    return f"{in_words(word) or repr('')} is not a flag; " + (
        f"did you mean {close[0]}?" if close else "--help lists them all"
    )
