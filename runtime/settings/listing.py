"""A table of settings as people read it: in .env.example and in docs/settings.md, both made from it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from runtime.errors import UserError
from runtime.settings.fields import Setting, Table, format_value, settings_of

BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
PAGE = Path("docs/settings.md")
PRECEDENCE = "a flag wins over an environment variable, that over a line in .env, and that over the default."


def env_example(cls: type[Table]) -> str:
    """The text of .env.example: every setting, commented out, at its default."""
    lines = [
        "# Copy this file to .env and uncomment what you want to change.",
        f"# {PRECEDENCE[0].upper()}{PRECEDENCE[1:]}",
        "# In a folder, ~ and $NAME are expanded. Write Windows folders without quotes: DATA_DIR=C:\\new\\texts",
    ]
    for group, rows in groups(cls).items():
        lines += ["", f"# --- {group} ---"]
        for row in (row for row in rows if row.env):
            notes = textwrap.wrap(f"{explained(row)} Default: {_defaults(row)}.", 100)
            lines += ["", *(f"# {note}" for note in notes), f"# {row.variable}={format_value(row.default)}"]
    return "\n".join(lines) + "\n"


def markdown_table(cls: type[Table]) -> str:
    """The settings as a Markdown table."""
    lines = ["| Setting | Default | What it does |", "|---|---|---|"]
    for group, rows in groups(cls).items():
        lines.append(f"| **{group}** | | |")
        for row in rows:
            name = row.variable if row.env else row.flag
            what = explained(row).replace("|", "\\|")
            lines.append(f"| `{name}` | {_defaults(row)} | {what} |")
    return "\n".join(lines)


def with_settings(page: str, cls: type[Table]) -> str:
    """A page's text with what is between its two markers made anew; UserError if it lacks them."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page of settings needs a line {BEGIN} and after it a line {END}")
    return f"{head}{BEGIN}\n{markdown_table(cls)}\n{END}{tail}"


def rewrite(root: Path, cls: type[Table]) -> None:
    """Write .env.example and, where there is a docs/settings.md, its table."""
    (root / ".env.example").write_text(env_example(cls), "utf-8", newline="\n")
    page = root / PAGE
    if page.exists():
        page.write_text(with_settings(page.read_text("utf-8"), cls), "utf-8", newline="\n")


def groups(cls: type[Table]) -> dict[str, list[Setting]]:
    """The rows of a table under their headings."""
    groups: dict[str, list[Setting]] = {}
    for row in settings_of(cls):
        groups.setdefault(row.group, []).append(row)
    return groups


def explained(row: Setting) -> str:
    """The help and, for numbers and choices, what is allowed; for other text the help itself says it."""
    listed = row.kind in (int, float) or row.choices
    return row.help + (f" ({row.must_be})." if listed else ".")


def _defaults(row: Setting) -> str:
    """The default and those of presets, as in `1500 (LoRA 500, TEST_MODE 60)`."""
    others = other_defaults(row)
    return (format_value(row.default) or "empty") + (f" ({others})" if others else "")


def other_defaults(row: Setting) -> str:
    """The defaults of presets, as in `LoRA 500, TEST_MODE 60`."""
    return ", ".join(f"{label} {format_value(value)}" for label, value in row.others.items())
