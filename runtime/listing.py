"""A table of settings as people read it: --help, .env.example and the README's section, all made from the table."""

from __future__ import annotations

import textwrap
from pathlib import Path

from runtime.errors import UserError
from runtime.fields import MODES, Setting, Table, in_words, settings_of

PLACEHOLDERS = {int: " N", float: " X", str: " TEXT", tuple: " TEXT"}
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
PRECEDENCE = "a flag wins over an environment variable, that over a line in .env, and that over the default."


def help_text(cls: type[Table], prog: str, description: str) -> str:
    """What --help prints, at most 100 columns wide."""
    lines = [f"usage: {prog} [--setting value ...]", "", *textwrap.wrap(description, 100), ""]
    lines += textwrap.wrap(f"Where a setting is given twice, {PRECEDENCE}", 100)
    for group, rows in _groups(cls).items():
        lines += ["", group]
        for row in rows:
            lines += _help_entry(row)
    return "\n".join(lines)


def env_example(cls: type[Table]) -> str:
    """The text of .env.example: every setting, commented out, at its default."""
    lines = [
        "# Copy this file to .env and uncomment what you want to change.",
        f"# {PRECEDENCE[0].upper()}{PRECEDENCE[1:]}",
    ]
    for group, rows in _groups(cls).items():
        lines += ["", f"# --- {group} ---"]
        for row in (row for row in rows if row.rule.env):
            notes = textwrap.wrap(f"{_explained(row)} Default: {_defaults(row)}.", 100)
            lines += ["", *(f"# {note}" for note in notes), f"# {row.variable}={in_words(row.default)}"]
    return "\n".join(lines) + "\n"


def readme_table(cls: type[Table]) -> str:
    """The settings as a Markdown table."""
    lines = ["| Setting | Default | What it does |", "|---|---|---|"]
    for group, rows in _groups(cls).items():
        lines.append(f"| **{group}** | | |")
        for row in rows:
            name = row.variable if row.rule.env else row.flag
            explained = _explained(row).replace("|", "\\|")
            lines.append(f"| `{name}` | {_defaults(row)} | {explained} |")
    return "\n".join(lines)


def with_settings(readme: str, cls: type[Table]) -> str:
    """A README's text with the section between its two markers made anew; UserError if it lacks them."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README needs a line {BEGIN} and after it a line {END}")
    return f"{head}{BEGIN}\n{readme_table(cls)}\n{END}{tail}"


def rewrite(root: Path, cls: type[Table]) -> None:
    """Write .env.example and, where there is a README.md, its settings section."""
    (root / ".env.example").write_text(env_example(cls), "utf-8", newline="\n")
    readme = root / "README.md"
    if readme.exists():
        readme.write_text(with_settings(readme.read_text("utf-8"), cls), "utf-8", newline="\n")


def _groups(cls: type[Table]) -> dict[str, list[Setting]]:
    groups: dict[str, list[Setting]] = {}
    for row in settings_of(cls):
        groups.setdefault(row.rule.group, []).append(row)
    return groups


def _help_entry(row: Setting) -> list[str]:
    flag = f"--[no-]{row.flag[2:]}" if row.kind is bool else row.flag + PLACEHOLDERS[row.kind]
    default = f"{row.variable if row.rule.env else 'default'}={in_words(row.default)}"
    others = _other_defaults(row)
    notes = textwrap.wrap(_explained(row) + (f" Default {others}." if others else ""), 94)
    return [f"  {flag:<34} {default}", *(f"      {note}" for note in notes)]


def _explained(row: Setting) -> str:
    """The help and, for numbers and choices, what is allowed; for other text the help itself says it."""
    listed = row.kind in (int, float) or row.rule.choices
    return row.rule.help + (f" ({row.allowed})." if listed else ".")


def _defaults(row: Setting) -> str:
    """The default and those of other modes, as in `1500 (LoRA 500, TEST_MODE 60)`."""
    others = _other_defaults(row)
    return (in_words(row.default) or "empty") + (f" ({others})" if others else "")


def _other_defaults(row: Setting) -> str:
    others = {MODES[mode]: row.rule.defaults[mode] for mode in MODES if mode in row.rule.defaults}
    return ", ".join(f"{label} {in_words(value)}" for label, value in others.items())
