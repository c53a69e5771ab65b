"""docs/zero-to-hero/ shows what its code prints; its commands have those flags, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.guide import ROOT, blocks_of, compared, pages, printed_blocks, same, write_programs
from benchmarks.guide_runs import SWEEPS, recorded
from runtime.settings.sources import read_settings
from tests.runtime.hostile_settings import TABLES
from tests.warm import run

INLINE = re.compile(r"`((?:python|make|torchrun) [^`]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]+))?\)")


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[Path, list[str]]:
    """What the code of each page prints."""
    done = run([write_programs(tmp_path_factory.mktemp("guide"))], ROOT, os.environ)
    assert not done.stderr and not done.returncode, done.stderr
    return printed_blocks(done.stdout)


def test_there_are_eleven_chapters_and_their_contents():
    assert [page.name[:2] for page in pages()] == [*(f"{n:02}" for n in range(1, 12)), "RE"]
    assert all(sum(block.kind == "python" for block in blocks_of(page.read_text("utf-8"))) for page in pages()[:-1])


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_shows_what_its_code_prints(printed, page):
    for block, output in compared(page.read_text("utf-8"), printed[page], with_marked=False):
        pytest.fail(f"{page.name}, line {block.line}: shown\n{block.shown}\nprinted\n{output}")


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("loss 1.830", "loss  1.834", True),
        ("loss 1.830", "loss 1.860", False),
        ("loss 1.830", "cost 1.830", False),
        ("rank 8", "rank 9", False),
        ("65,536 of 3", "65,537 of 3", False),
        ("1.5e-07", "1.6e-07", True),
        ("1.5e-07", "1.5e-06", False),
        ("0.02", "0.03", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("...\nb\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nc\n...\nb\n...\n", "a\nb\nc\n", False),
        ("a\nb", "a\nb\nc", False),
        ("...\nb\nc\n...\nc\nd", "b\nc\nd", False),
        ("", "a", False),
    ],
)
def test_what_counts_as_the_same(shown, printed, alike):
    assert same(shown, printed) == alike


def test_the_record_has_the_runs_that_are_asked_for():
    record = recorded()
    assert {sweep: list(record[sweep]) for sweep in SWEEPS} == {sweep: list(rows) for sweep, rows in SWEEPS.items()}


def prose_of(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> Iterator[str]:
    """The commands in blocks of sh, and those in the middle of a sentence."""
    for block in blocks_of(text):
        if block.kind == "sh":
            yield from block.code.splitlines()
    yield from INLINE.findall(prose_of(text))


def check_command(line: str) -> None:
    """Raises UsageError for flags or values that a command of ours would refuse; asserts that the rest is there."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return
    assert words.pop(0) == "python", line
    if words[:3] == ["-m", "pip", "install"]:
        assert words[3] == "-r" and (ROOT / words[4]).is_file(), line
    elif words[0] == "-m":
        sources = [ROOT / f"{words[1].replace('.', '/')}.py", ROOT / "benchmarks/contest.py"]
        known = "".join(path.read_text() for path in sources)
        assert all(f'"{word}"' in known for word in words[2:] if word.startswith("--")), line
    else:
        named = " ".join(words[:2])  # as `adapters.py list`
        command = named if named in TABLES else words[0]
        flags = words[len(command.split()) :]
        read_settings(TABLES[command], flags, {}, Path("nowhere"), prog=command, description="")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_these_flags(page):
    for line in commands_of(page.read_text("utf-8")):
        check_command(line)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page):
    for path, place in LINK.findall(prose_of(page.read_text("utf-8"))):
        target = page.parent / path
        assert target.is_file(), f"{page.name}: {path}"
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if place else []
        assert not place or place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
