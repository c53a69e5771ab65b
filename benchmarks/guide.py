"""Run the code of docs/zero-to-hero/ and compare what it prints with what the pages show.

python -m benchmarks.guide            all pages; status 1 where one shows something else than its code prints
python -m benchmarks.guide --write    and write what was printed into the pages

What a block of Python prints stands right below it, as a block of text or as a table; where there is neither, it
prints nothing. The Python of a page is one program, whose lines have the numbers that they have in the page. A block of
sh is run where `<!-- run by make guide -->` stands above it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.runs import ROOT
from runtime.processes.command import run_command
from runtime.storage import folders

PAGES = ROOT / "docs" / "zero-to-hero"
BLOCK = re.compile(
    r"(?P<mark><!-- run by make guide -->\n)?```(?P<kind>python|sh)\n(?P<code>.*?)^```\n"
    r"(?:\n(?:```text\n(?P<text>.*?)^```$|(?P<table>(?:\|[^\n]*\n)+)))?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
TOLERANCE = 0.01  # of a number with a fraction; one without is exact
LEFT_OUT = "..."  # a line that stands for any number of lines
PAGE, BLOCK_ENDS = "\x01", "\x02"  # in what is printed


class Block(NamedTuple):
    """A block of code of a page: its first line there, its code, what the page shows below it, where that stands in the
    page's text, and whether `make guide` alone runs it."""

    line: int
    kind: str
    code: str
    shown: str | None
    place: tuple[int, int]
    marked: bool


def pages() -> list[Path]:
    """The pages, in the order of their names."""
    return sorted(PAGES.glob("*.md"))


def blocks_of(text: str) -> list[Block]:
    """The blocks of code of a page."""
    found = []
    for match in BLOCK.finditer(text):
        below = "text" if match["text"] is not None else "table"
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(line, match["kind"], match["code"], match[below], match.span(below), bool(match["mark"])))
    return found


def program_of(text: str) -> str:
    """The page's program, each line at its line in the page; the line that closes a block prints BLOCK_ENDS."""
    lines = [""] * text.count("\n")
    for block in (block for block in blocks_of(text) if block.kind == "python"):
        code = block.code.splitlines()
        lines[block.line - 1 : block.line + len(code)] = [*code, f"print({BLOCK_ENDS!r}, end='')"]
    return "\n".join(lines) + "\n"


def write_programs(folder: Path) -> Path:
    """Write the program of each page into a folder, and one that runs them all, whose path is returned. It prints PAGE
    before each; an error ends a page and not the others."""
    names = []
    for page in pages():
        (folder / f"{page.stem}.py").write_text(program_of(page.read_text("utf-8")), "utf-8")
        names.append(f"{page.stem}.py")
    everything = folder / "everything.py"
    everything.write_text(
        f"import os, runpy, sys, traceback\nos.chdir({str(ROOT)!r})\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {names!r}:\n    print({PAGE!r}, end='')\n    try:\n"
        f"        runpy.run_path(os.path.join({str(folder)!r}, name))\n"
        "    except Exception:\n        traceback.print_exc()\n",
        "utf-8",
    )
    return everything


def printed_blocks(output: str) -> dict[Path, list[str]]:
    """What each page's blocks printed, of the output of `everything`."""
    outputs = output.split(PAGE)[1:]
    return {page: text.split(BLOCK_ENDS)[:-1] for page, text in zip(pages(), outputs, strict=True)}


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for white space, LEFT_OUT lines, and TOLERANCE in fractions."""
    parts = [part.splitlines() for part in re.split(rf"^{re.escape(LEFT_OUT)}\n", f"{shown.strip()}\n", flags=re.M)]
    lines = printed.strip().splitlines()
    if len(parts) == 1:
        return _alike(parts[0], lines)
    if not _alike(parts[0], lines[: len(parts[0])]) or not _alike(parts[-1], lines[len(lines) - len(parts[-1]) :]):
        return False
    at = len(parts[0])
    for part in parts[1:-1]:
        places = (i for i in range(at, len(lines)) if _alike(part, lines[i : i + len(part)]))
        if (place := next(places, None)) is None:
            return False
        at = place + len(part)
    return at <= len(lines) - len(parts[-1])


def _alike(shown: list[str], printed: list[str]) -> bool:
    return len(shown) == len(printed) and all(map(_line_alike, shown, printed))


def _line_alike(shown: str, printed: str) -> bool:
    words = [NUMBER.sub("0", line).split() for line in (shown, printed)]
    numbers = [NUMBER.findall(line) for line in (shown, printed)]
    return words[0] == words[1] and all(map(_close, *numbers))


def _close(shown: str, printed: str) -> bool:
    mantissa, _, exponent = shown.partition("e")
    if not (decimals := len(mantissa.partition(".")[2])):
        return shown == printed
    one, other = (float(number.replace(",", "")) for number in (shown, printed))
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1.01 * 10.0 ** (int(exponent or 0) - decimals))


def run_marked(block: Block) -> str:
    """What a marked block of sh prints, on both streams."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(block.code, end="", file=sys.stderr, flush=True)
    done = subprocess.run(
        ["sh", "-c", block.code], cwd=ROOT, env=os.environ | {"PATH": path}, encoding="utf-8", check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def compared(text: str, printed: Iterable[str], with_marked: bool) -> Iterator[tuple[Block, str | None]]:
    """Each block of a page that printed something else than the page shows, with what it printed; None for one that an
    error ended, or kept from running."""
    outputs = iter(printed)
    for block in blocks_of(text):
        if block.kind == "python":
            output = next(outputs, None)
        elif block.marked and with_marked:
            output = run_marked(block)
        else:
            continue
        if output is None or not same(block.shown or "", output):
            yield block, output


def rewritten(text: str, printed: Sequence[tuple[Block, str | None]]) -> str:
    """The page with what blocks printed, where it shows anything below them."""
    for block, output in reversed(printed):
        if block.shown is None or output is None:
            continue
        start, end = block.place
        text = f"{text[:start]}{output.rstrip()}\n{text[end:]}"
    return text


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--write", action="store_true", help="write what was printed into the pages")
    options, wrong = flags.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        program = write_programs(Path(folder))
        done = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    for page, printed in printed_blocks(done.stdout).items():
        text = page.read_text("utf-8")
        others = list(compared(text, printed, with_marked=True))
        for block, output in others:
            found = "an error, which is above" if output is None else output
            print(f"{page.relative_to(ROOT)}, line {block.line}: shown\n{block.shown or ''}printed\n{found}")
        if options.write and others:
            folders.write_file(page, rewritten(text, others).encode())
        wrong += len(others)
    print(f"{len(pages())} pages; {wrong} blocks print something else than their page shows")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_command(main)
