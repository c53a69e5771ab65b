"""docs/zero-to-hero/ shows what its code prints. (Its commands and links: tests/runtime/test_documents.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.guide import ROOT, blocks_of, compared, pages, printed_blocks, same, write_programs
from benchmarks.guide_runs import SWEEPS, recorded
from tests.warm import run


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
