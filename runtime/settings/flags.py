"""The command line: one argparse flag for each setting of a table, with the table's help."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from runtime.errors import UsageError
from runtime.settings.fields import Setting, Table, format_value, settings_of
from runtime.settings.listing import PRECEDENCE, explained, groups, other_defaults
from runtime.settings.spelling import near_miss, suggestion

DASHES = "--\0"  # stands for the value in --prompt=--, which argparse drops; no command line can hold a NUL
HELP_ALL = "--help-all"
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", tuple: "TEXT", bool: "BOOL"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are a UsageError: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise UsageError(f"{message.removeprefix('argument ')}; --help lists all flags")


def make_parser(cls: type[Table], prog: str, description: str, whole: bool = False) -> Parser:
    """A parser that leaves every value as text, and absent what was not given. Its --help shows the settings that
    people use most, where the table says which these are; --help-all shows all."""
    columns = min(100, shutil.get_terminal_size().columns)
    rows = settings_of(cls)
    seldom = {row.name for row in rows if cls.often and row.env and row.name not in cls.often and not whole}
    more = f"{HELP_ALL} shows {len(seldom)} settings more. " if seldom else ""
    places = [f"{row.flag}{' ...' * (row.kind is tuple)}" for row in rows if row.metavar]
    parser = Parser(
        prog=prog,
        usage=" ".join([prog, *places, "[--setting value ...]"]),
        description=description,
        epilog=textwrap.fill(f"{more}Where a setting is given twice, {PRECEDENCE}", 100),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=columns),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if cls.often:
        parser.add_argument(HELP_ALL, action="store_true", help="show all settings, and exit")
    for title, rows in groups(cls).items():
        group = parser.add_argument_group(title)
        for row in rows:
            _add_flag(group, row, shown=row.name not in seldom)
    return parser


def _add_flag(group: argparse._ArgumentGroup, row: Setting, shown: bool) -> None:
    if row.metavar:
        many = {"nargs": "+"} if row.kind is tuple else {}
        group.add_argument(row.name, metavar=row.flag, help=explained(row).replace("%", "%%"), **many)
        return
    options: dict[str, Any] = {"action": "append" if row.kind is tuple else "store", "required": row.required}
    if row.kind is bool:  # `--use-lora`, `--use-lora False` and `--no-use-lora`, all as text
        options |= {"nargs": "?", "const": "true"}
        off = "--no-" + row.flag.removeprefix("--")
        group.add_argument(off, dest=row.name, action="store_const", const="false", help=argparse.SUPPRESS)
    text = f"{explained(row)} {_default(row)}".replace("%", "%%") if shown else argparse.SUPPRESS
    group.add_argument(row.flag, dest=row.name, metavar=PLACEHOLDERS[row.kind], help=text, type=_as_given, **options)
    for other in row.spellings[1:]:
        group.add_argument(other.flag, dest=other.name, help=argparse.SUPPRESS, type=_as_given)


def _default(row: Setting) -> str:
    if row.required:
        return "[required]"
    others = other_defaults(row)
    name = row.variable if row.env else "Default"
    return f"[{name}={format_value(row.default)}{f'; {others}' if others else ''}]"


def read_flags(cls: type[Table], argv: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """The text given for each setting that has a flag in `argv`, by the name it has there. `--lora_rank` is
    `--lora-rank`.

    Raises UsageError for an unknown flag, with the one that was meant, and SystemExit after printing --help.
    """
    words = _with_values([_with_dashes(word) for word in argv])
    if cls.often and HELP_ALL in words:
        make_parser(cls, prog, description, whole=True).print_help()
        sys.exit(0)
    found, unknown = make_parser(cls, prog, description).parse_known_args(words)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0], settings_of(cls)))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}


def _with_dashes(word: str) -> str:
    name, equals, text = word.partition("=")
    return name.replace("_", "-") + equals + (DASHES if text == "--" else text) if name.startswith("--") else word


def _as_given(text: str) -> str:
    return "--" if text == DASHES else text


def _with_values(words: Sequence[str]) -> list[str]:
    """`--weights -1,0.5` as `--weights=-1,0.5`: argparse would take the value for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and re.match(r"-[.\d]", word) and re.fullmatch(r"--[^=]+", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def subcommand(words: Sequence[str], commands: Collection[str], description: str) -> str:
    """The first word, which says which of several commands is meant.

    Raises UsageError for none or an unknown one, with the one that was meant, and SystemExit after printing --help.
    """
    word = words[0] if words else ""
    if word in ("-h", "--help"):
        print(description.strip())
        sys.exit(0)
    if word not in commands:
        close = difflib.get_close_matches(word, commands, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        asked = f"there is no command {format_value(word)!r}; {meant}" if word else "which command? "
        raise UsageError(f"{asked}There are: {', '.join(commands)}; --help tells of each")
    return word


def _unknown_flag(word: str, rows: Sequence[Setting]) -> str:
    if not word.startswith("-") and any(row.metavar for row in rows):
        return f"{format_value(word) or repr('')} is one argument too many; --help tells what there may be"
    asked = word.partition("=")[0].removeprefix("--")
    flags = {each.variable: each.flag for row in rows if not row.metavar for each in row.spellings}
    hint = suggestion(asked, flags, near_miss(asked, flags, alike=0.6)) or "--help lists them all"
    return f"{format_value(word) or repr('')} is not a flag; {hint}"
