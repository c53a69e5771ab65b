"""Every way to give every setting of every command, and what is right to make of it.

All of it is derived from the tables, so a new setting, choice or command is struck as soon as it is there.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import compare
import dataset
import evaluate
import export
import generate
import playground
import report
import serve
import tune
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.fields import Setting, Table, settings_of
from runtime.settings.sources import Resolved, read_settings

TABLES: dict[str, type[Table]] = {
    "training.py": Settings,
    "compare.py": compare.Options,
    "generate.py": generate.Options,
    "evaluate.py": evaluate.Options,
    "export.py": export.Options,
    "playground.py": playground.Options,
    "report.py": report.Options,
    "serve.py": serve.Options,
    "tune.py": tune.Options,
}
TABLES |= {f"adapters.py {word}": table for word, table in adapters.COMMANDS.items()}
TABLES |= {f"dataset.py {word}": table for word, table in dataset.COMMANDS.items()}

FLAG_FORMS = ("--flag=text", "--flag text", "--flag twice")
VARIABLE_FORMS = ("environment", ".env", ".env unquoted")
REFUSED = object()
MODEST = re.compile(r"[\w.,:/+-]+", re.ASCII)  # means itself in .env without quotes
# A word that begins with a minus is a flag to argparse, but for numbers after a flag.
LOOKS_LIKE_A_FLAG = re.compile(r"-(?![.\d])", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """What a command finds when it starts."""

    argv: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()
    dotenv: str = ""


@functools.cache
def distinct_rows() -> list[tuple[type[Table], Setting]]:
    """Each setting once, with the first table that has it; most commands share some."""
    found: list[tuple[type[Table], Setting]] = []
    for table in TABLES.values():
        found += [(table, row) for row in settings_of(table) if all(row != other for _, other in found)]
    return found


def forms_of(row: Setting) -> Iterator[str]:
    """The ways in which this setting can be given."""
    yield from ("word",) if row.metavar else FLAG_FORMS
    yield from VARIABLE_FORMS if row.env else ()


def carried(form: str, text: str) -> str:
    """As much of the text as this source can carry: no NUL, and a UTF-8 file no surrogates."""
    text = text.replace("\0", "")
    return text.encode("utf-8", "replace").decode() if form.startswith(".env") else text


def give(table: type[Table], row: Setting, form: str, text: str) -> Given:
    """A command line, an environment and a .env that give one setting in one form, and whatever else is required."""
    others = [other for other in settings_of(table) if other is not row]
    words = [text if other is row else "a" for other in settings_of(table) if other.metavar]
    words += [f"{other.flag}=a" for other in others if other.required]
    if form == "--flag text":
        words += [row.flag, text]
    elif form in FLAG_FORMS:
        words += [f"{row.flag}={text}"] * (2 if form == "--flag twice" else 1)
    if form == "environment":
        return Given(tuple(words), ((row.variable, text),))
    if form.startswith(".env"):
        line = f"{row.variable}={text if form == '.env unquoted' else quoted(text)}\n"
        return Given(tuple(words), (("DOLLAR", "$"),), line)
    return Given(tuple(words))


def quoted(text: str) -> str:
    """A text as .env can hold any, with its dollars from a variable, as `${NAME}` means something even in quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + escaped.replace("$", "${DOLLAR}") + "'"


def outcome(table: type[Table], given: Given, folder: Path) -> Resolved | str | None:
    """What the command makes of it: its settings, the line it ends with at exit status 2, or None for --help.

    Whatever else is raised is a bug, and so is a line that is none or that only becomes one when it is printed.
    """
    path, found, code = folder / (".env" if given.dotenv else "no .env"), [], None
    if given.dotenv:
        path.write_bytes(given.dotenv.encode())

    def main() -> None:
        try:
            environ = dict(given.environ)
            found.append(read_settings(table, given.argv, environ, path, prog="x", description="", also=(Settings,)))
        except UsageError as error:
            assert str(error).isprintable(), str(error)
            raise

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
        try:
            run_command(main)
        except SystemExit as end:
            code = end.code
    line = stderr.getvalue()
    if not code:
        assert not line
        return found[0] if found else None
    assert code == 2 and line.startswith("error: ") and line.endswith("\n") and len(line) < 2000, line
    return line.removeprefix("error: ").removesuffix("\n")


# --- what is right --------------------------------------------------------------------------------------------------


def as_read(form: str, text: str) -> str:
    """A text as its source gives it: variables lose the blanks around them."""
    return text.strip() if form in VARIABLE_FORMS else text


def meaning(row: Setting, form: str, text: str) -> Any:
    """What a text given in this form must come to, said a second way: a value, or REFUSED."""
    text = as_read(form, text)
    if row.kind is tuple:
        return _texts(row, (text, text) if form == "--flag twice" else (text,))
    if row.optional and text.lower() in (("", "none") if row.nothing == "none" else (row.nothing,)):
        return None
    if row.kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        return words.get(text.lower(), REFUSED)
    if row.kind is str:
        text = os.path.expanduser(text) if row.path else text  # noqa: PTH111
        right = text in row.choices if row.choices else re.fullmatch(row.pattern, text)
        return text if right else REFUSED
    return _number(row, text)


def _texts(row: Setting, texts: tuple[str, ...]) -> Any:
    free = row.pattern == type(row).pattern
    return texts if free or all(re.fullmatch(row.pattern, text) for text in texts) else REFUSED


def _number(row: Setting, text: str) -> Any:
    signless = text[1:] if text[:1] in ("+", "-") else text
    letters = set("0123456789") | (set(".eE+-") if row.kind is float else set())
    if not signless or set(signless) - letters or (row.kind is int and len(signless) > 18):
        return REFUSED
    try:
        value = row.kind(text)
    except ValueError:
        return REFUSED
    return value if math.isfinite(value) and in_bounds(row, value) else REFUSED


def in_bounds(row: Setting, value: float) -> bool:
    """Whether a number is within its setting's bounds."""
    if row.low is not None and (value < row.low or (row.low_open and value == row.low)):
        return False
    return row.high is None or not (value > row.high or (row.high_open and value == row.high))


def is_plain(row: Setting, form: str, text: str) -> bool:
    """Whether this form carries the text as a value of this setting, rather than as a flag or as .env's syntax."""
    if form == ".env unquoted":
        return MODEST.fullmatch(text) is not None
    if form == "--flag text":
        return not LOOKS_LIKE_A_FLAG.match(text)
    return not (form == "word" and text.startswith("-"))


def source_of(row: Setting, form: str) -> str:
    """What `Resolved.sources` must say."""
    if form in FLAG_FORMS:
        return f"flag {row.flag}"
    return {"word": "argument", "environment": "environment"}.get(form, ".env")


def told(row: Setting, form: str, value: Any) -> str:
    """How a message must name a setting, its value and its source, with a long or unprintable value cut short."""
    value = ", ".join(map(shown, value)) if isinstance(value, tuple) else value
    if form in FLAG_FORMS:
        return f"{row.flag} {shown(value) or repr('')} (flag)"
    origin = {"word": "argument", "environment": "from the environment"}.get(form, "from .env")
    return f"{row.variable}={shown(value)} ({origin})"


def shown(text: str) -> str:
    """A text as a message may show it."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
