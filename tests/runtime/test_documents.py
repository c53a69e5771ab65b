"""What the README and the pages of docs show can be typed and followed: commands, flags, make targets, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hostile_settings import TABLES

from runtime.settings.fields import settings_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "templates/README.md",
]
NOT_OURS = ("convert_checkpoint.py",)


def commands(page: Path) -> list[str]:
    """The lines of a page that can be typed: those of blocks of a shell, without comments and continued lines."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines() if line.strip()]


def flags_of(table: type) -> set[str]:
    """All flags of a command, as they may be spelt."""
    found = {"--help", "-h"}
    for row in settings_of(table):
        names = {row.flag, *([f"--{row.also}"] if row.also else [])}
        found |= names | {f"--no-{name.removeprefix('--')}" for name in names if row.kind is bool}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_the_flags_that_a_page_gives_them(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)
        scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(templates/)?\w+\.(py|sh)", word)]
        if not scripts or words[scripts[0]] in NOT_OURS:
            continue
        script, given = words[scripts[0]], words[scripts[0] + 1 :]
        assert (ROOT / script).is_file(), line
        name = f"{script} {given[0]}" if given and f"{script} {given[0]}" in TABLES else script
        if name in TABLES:
            typed = {word.partition("=")[0] for word in given if word.startswith("--")}
            assert typed <= flags_of(TABLES[name]), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_targets_links_and_pictures_are_there(page: Path) -> None:
    text, makefile = page.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for module, rest in re.findall(r"python -m (benchmarks\.\w+)([^`\n#]*)", text):
        source = ROOT / f"{module.replace('.', '/')}.py"
        assert source.is_file(), module
        known = source.read_text("utf-8") + (ROOT / "benchmarks/contest.py").read_text("utf-8")
        for flag in re.findall(r"--[a-z][a-z-]+", rest):
            assert f'"{flag}"' in known or flag[2:] in known, f"{module} {flag}"
    for target in re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert link.startswith(("http://", "https://")) or (page.parent / link).exists(), link
