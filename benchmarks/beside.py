"""A benchmark of this revision beside that of an earlier one, in turn, so that what disturbs the machine hits both.

git worktree add ../earlier 5312f1e
python -m benchmarks.beside ../earlier lora_step --sizes 0.8M --tokens 4096 --rounds 5

What follows the folder is a benchmark and its flags, all of which the earlier revision must know too; --turns and
--record come before the folder.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.contest import close
from benchmarks.runs import ROOT
from runtime.errors import UsageError, UserError
from runtime.processes.command import run_command

ROW = re.compile(r"(?P<what>\S.*?) {2,}(?P<median>\d+\.\d+) +\(\d+\.\d+ to \d+\.\d+\)")  # as `contest.tell` prints it


def rows_of(folder: Path, words: list[str]) -> dict[str, float]:
    """The medians that a benchmark in this folder prints, by what was measured. Raises UserError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]],
        cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        told = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{words[0]} failed in {folder}, with exit status {done.returncode}: {told}")
    return {row["what"]: float(row["median"]) for row in map(ROW.match, done.stdout.splitlines()) if row}


def beside(folder: Path, words: list[str], turns: int) -> list[dict]:
    """The rows that both revisions have, with the medians of each turn."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
        earlier, here = rows_of(folder, words), rows_of(ROOT, words)
        for what in (what for what in here if what in earlier):
            now, then = found.setdefault(what, ([], []))
            now.append(here[what])
            then.append(earlier[what])
    return [
        {"what": what, "median": statistics.median(now), "min": min(now), "max": max(now)}
        | {"earlier": {"median": statistics.median(then), "min": min(then), "max": max(then)}}
        for what, (now, then) in found.items()
    ]


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--turns", type=int, default=3)
    flags.add_argument("--record", action="store_true", help="keep the rows in benchmarks/results")
    flags.add_argument("folder", type=Path, help="a worktree of the earlier revision")
    flags.add_argument("words", nargs=argparse.REMAINDER, metavar="benchmark ...", help="what is run in both")
    options = flags.parse_args()
    if not options.words:
        raise UsageError("which benchmark? name it after the folder: lora_step, generate, variants, ...")
    if not (options.folder / "benchmarks" / f"{options.words[0]}.py").is_file():
        raise UsageError(f"{options.folder} has no benchmarks/{options.words[0]}.py")
    if "--record" in options.words:
        raise UsageError("--record belongs before the folder: it keeps the rows of both")
    rows = beside(options.folder, options.words, options.turns)
    for row in rows:
        now, then = (f"{each['median']:.2f} ({each['min']:.2f} to {each['max']:.2f})" for each in (row, row["earlier"]))
        print(f"{row['what']:<72} {now:<22} earlier {then}", flush=True)
    close(f"beside-{options.words[0]}", rows, options.record)


if __name__ == "__main__":
    run_command(main)
