"""Where settings come from: flag, environment, .env, default, in this order. Misspelt names are refused."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from runtime.console import say
from runtime.errors import UsageError
from runtime.settings.fields import ContradictionError, Setting, Table, format_value, resolve, settings_of
from runtime.settings.flags import read_flags
from runtime.settings.spelling import FOREIGN, SHELLS_OWN, is_ours, near_miss, suggestion

ENVIRONMENT, DOTENV = "environment", ".env"


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and, for each that was given, where it came from, as in {'LORA_RANK': 'environment'}."""

    settings: Any
    sources: dict[str, str]

    def explicit(self, name: str) -> bool:
        """Whether this setting was given rather than left to its default."""
        return name.upper() in self.sources


def read_settings(
    cls: type[Table],
    argv: Sequence[str],
    environ: Mapping[str, str],
    dotenv_path: str | Path,
    *,
    prog: str,
    description: str,
    also: Iterable[type[Table]] = (),
) -> Resolved:
    """Read a table from flags, environment and .env; `also` names other commands' tables, which share the latter two.

    Raises UsageError, one line, for anything misspelt or not allowed; SystemExit after printing --help.
    """
    flags = read_flags(cls, argv, prog, description)
    all_rows = (row for table in (*also, cls) for row in settings_of(table) if row.env)
    rows = {each.variable: each for row in all_rows for each in row.spellings}
    dotenv = _read_dotenv(Path(dotenv_path), environ, rows)
    _check_names(rows, dotenv, DOTENV)
    _check_names(rows, [name for name in environ if name not in FOREIGN], ENVIRONMENT)
    own = {row.name: row for row in settings_of(cls)}
    found = {name: hit for name, row in own.items() if (hit := _find(row, flags, environ, dotenv))}
    given = {name: _parsed(*hit) for name, hit in found.items()}
    try:
        return Resolved(resolve(cls, given), {own[name].variable: source for name, (*_, source) in found.items()})
    except ContradictionError as error:
        written = {name: (own[name], value, "default") for name, value in error.values.items()} | found
        left, right = (_as_written(*written[name]) for name in (error.left, error.right))
        raise UsageError(f"{left} {error.relation} {right}") from None


def describe(resolved: Resolved) -> list[str]:
    """A line for each setting that was given, as in `LORA_RANK=16 (environment)`."""
    rows = {row.variable: row for row in settings_of(type(resolved.settings))}
    values = {name: rows[name].shown(getattr(resolved.settings, name.lower())) for name in resolved.sources}
    return [f"{name}={values[name]} ({source})" for name, source in resolved.sources.items()]


def _find(
    row: Setting, flags: dict, environ: Mapping[str, str], dotenv: Mapping[str, str]
) -> tuple[Setting, Any, str] | None:
    """A setting by the name it was given, the text and its source: the first source that has one.

    Raises UsageError where one source has both of its names.
    """
    sources = (("flag", flags), (ENVIRONMENT, environ), (DOTENV, dotenv))
    for source, values in sources:
        hits = [(each, text) for each in row.spellings if (text := _text_in(values, each, source)) is not None]
        if len(hits) > 1:
            one, other = (_as_written(each, text, source) for each, text in hits)
            raise UsageError(f"{one} and {other} are the same setting; keep one of them")
        for each, text in hits:
            return each, text, source if source != "flag" else "argument" if row.metavar else f"flag {each.flag}"
    return None


def _text_in(values: Mapping[str, Any], row: Setting, source: str) -> Any:
    """The text that a source has for a setting, or None."""
    if source == "flag":
        return values.get(row.name)
    text = values.get(row.variable) if row.env else None
    if text is None or (source == ENVIRONMENT and re.fullmatch(SHELLS_OWN.get(row.variable, "(?!)"), text.strip())):
        return None
    return text.strip()  # cmd's `set A=8 && python ...` gives "8 "


def _parsed(row: Setting, text: Any, source: str) -> Any:
    try:
        return row.parse(text)
    except ValueError:
        raise UsageError(f"{_as_written(row, text, source)}: must be {row.must_be}") from None


def _as_written(row: Setting, value: Any, source: str) -> str:
    """A setting, its value and its source, as a message names them."""
    if source.startswith("flag"):
        return f"{row.flag} {format_value(value) or repr('')} (flag)"
    origin = {ENVIRONMENT: "from the environment", DOTENV: "from .env"}.get(source, source)
    return f"{row.variable}={format_value(value)} ({origin})"


# --- .env -----------------------------------------------------------------------------------------------------------


def _read_dotenv(path: Path, environ: Mapping[str, str], rows: Mapping[str, Setting]) -> dict[str, str]:
    """The file's values. python-dotenv skips a bad line with a mere log message; here it is refused."""
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_dotenv_text(path))):
        where = f"{path} line {_line(binding)}"
        if binding.error:
            raise UsageError(f"{where}: cannot be read; write NAME=value, and comments after #")
        if binding.key is None:
            continue
        key = binding.key
        if binding.value is None:
            raise UsageError(f"{where}: {format_value(key)} has no value; write {format_value(key)}=value")
        if key in values:
            raise UsageError(f"{where}: {format_value(key)} was given before; keep one of the two lines")
        values[key] = _value(binding, {**environ, **values}, rows.get(key), where)
    return values


def _dotenv_text(path: Path) -> str:
    try:
        if not path.exists() or path.is_dir():  # a folder .env is somebody's virtual environment
            return ""
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it again as UTF-8") from None
    if "\0" in text:  # every other byte of UTF-16, whose letters would otherwise read as UTF-8
        raise UsageError(f"{path} is not UTF-8 text but looks like UTF-16; save it again as UTF-8")
    return text


def _line(binding: Binding) -> int:
    """The line that a statement starts on; python-dotenv counts blank lines before it to the statement."""
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", blank))


def _value(binding: Binding, known: Mapping[str, str], row: Setting | None, where: str) -> str:
    """The value of a line, with each ${NAME} replaced, and in folders $NAME too.

    In a setting, a name that is not set is refused, and so is a backslash in double quotes: "C:\\new" has a newline.
    """
    value = binding.value
    if row and re.search(r'=\s*"[^"]*\\', binding.original.string):
        raise UsageError(f"{where}: {row.variable} has a backslash in double quotes; write the value without quotes")
    if row and row.path:
        value = re.sub(r"\$([A-Za-z_]\w*)", r"${\1}", value)
    atoms = list(parse_variables(value))
    for atom in atoms:
        if row and isinstance(atom, Variable) and atom.default is None and atom.name not in known:
            raise UsageError(f"{where}: ${{{format_value(atom.name)}}} is not set")
    return "".join(atom.resolve(known) for atom in atoms)


# --- names that are no settings -------------------------------------------------------------------------------------


def _check_names(rows: Mapping[str, Setting], names: Iterable[str], source: str) -> None:
    """Refuse names that mean a setting; the environment is shared, so there only those that must be ours.

    Of the others there, which may be another program's, a warning tells that they are ignored.
    """
    distinctive = [name for name in rows if "_" in name]
    shown = {name: name for name in rows}
    for name in (name for name in names if name not in rows):
        near = near_miss(name, distinctive)
        hint = suggestion(name, shown, near)
        line = f"{format_value(name)} (in {'the ' * (source == ENVIRONMENT)}{source}) is not a setting"
        if is_ours(name, near) or (hint and source == DOTENV):
            raise UsageError(f"{line}; {hint or '--help lists them all'}")
        if hint:
            say(f"warning: {line} and is ignored; {hint}")
