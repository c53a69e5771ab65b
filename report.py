"""A report on a run, or on several side by side: one HTML file that opens anywhere, with nothing to install.

python report.py lora-folio-r8                     lora-folio-r8-report.html
python report.py lora-folio-r8 dora-folio-r8       both, their curves in one chart, and the settings that differ
python report.py lora-folio-r8 --md --png          Markdown and pictures as well
python report.py lora-pairs-r16 --evaluation answers       with the scorecard of evaluate.py --out answers
python report.py lora-folio-r8 --no-measure        at once: only what is in the run's files

It measures what no file says, in some seconds: what each linear learned, what is forgotten, what is wrong with records.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.adapting.adapted import check_free
from jobs.adapting.plots import draw_sizes
from jobs.reporting.beside import page
from jobs.reporting.facts import Facts, read_facts
from jobs.reporting.html import document
from jobs.reporting.markdown import markdown
from jobs.reporting.measuring import Measured, Wish, measure
from jobs.reporting.plots import charts_of, draw_charts
from jobs.runs.preflight import check_writable
from runtime.device import pick_machine
from runtime.errors import UsageError
from runtime.pictures import save_picture, without_pictures
from runtime.processes.command import run_command
from runtime.settings.config import FOLDER, CommonSettings, from_command_line
from runtime.settings.fields import setting
from runtime.storage import folders

WHAT = {"group": "What to report", "env": False}
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, "allowed": "a path", **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(CommonSettings):
    """The flags of report.py."""

    runs: tuple[str, ...] = setting((), "Runs, by name or folder", metavar="RUN", **WHAT | {"pattern": FOLDER})
    out: str = setting("", "The new file; empty takes RUN-report.html here, or the next free name", **A_PATH)
    md: bool = setting(False, "Markdown as well, beside the file", **WHAT)
    png: bool = setting(False, "Pictures as well, beside the file", **WHAT)
    evaluation: tuple[str, ...] = setting(
        (), "A folder that evaluate.py --out has made; may be repeated. Those inside the run's own folder are found",
        **WHAT | {"pattern": FOLDER},
    )  # fmt: skip
    measure: bool = setting(True, "Measure what the runs' files do not say, or only read these", **WHAT)
    eval_iters: int = setting(
        10, "Batches of held-out text that forgetting is measured on", low=1, high=10**6, **WHAT
    )  # fmt: skip


def places(options: Options, runs: list[Facts]) -> dict[str, Path]:
    """The files to be written, by what they are; none of them is there. Raises UsageError where one is in the way."""

    def beside(stem: Path) -> dict[str, Path]:
        found = {"html": stem.with_name(stem.name + ".html")}
        found |= {"md": stem.with_name(stem.name + ".md")} if options.md else {}
        if options.png:
            found |= {"curves": stem.with_name(f"{stem.name}-curves.png")}
            for facts in (facts for facts in runs if facts.run.kind == "lora"):
                which = f"-{facts.run.name}" if len(runs) > 1 else ""
                found[facts.run.name] = stem.with_name(f"{stem.name}-changes{which}.png")
        return found

    if options.out:
        out = Path(options.out)
        found = beside(out.with_suffix("") if out.suffix in (".html", ".htm") else out) | {"html": out}
        for path in found.values():
            check_free(path)
    else:
        name = runs[0].run.name + (f"-and-{len(runs) - 1}-more" if len(runs) > 1 else "") + "-report"
        stems = (Path(f"{name}{f'-{i}' if i > 1 else ''}") for i in range(1, 10**6))
        found = next(found for stem in stems if not any(map(os.path.lexists, (found := beside(stem)).values())))
    check_writable(found["html"].absolute().parent)
    return found


def check(options: Options) -> None:
    """Raises UsageError for what cannot be, before anything is read."""
    if len(set(options.runs)) < len(options.runs):
        raise UsageError(f"a run is named twice: {', '.join(options.runs)}")
    if options.png and (needed := without_pictures()):
        raise UsageError(f"--png: {needed}")


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings
    check(options)
    root = Path(options.checkpoints_dir)
    runs = [read_facts(root, name, options.evaluation) for name in options.runs]
    files = places(options, runs)
    found = [Measured() for _ in runs]
    if options.measure:
        wish = Wish(root, Path(options.data_dir), options.eval_iters, pick_machine(options.device, options.dtype))
        found = [measure(facts, wish) for facts in runs]
    told = page(list(zip(runs, found, strict=True)), shlex.join(["python", "report.py", *sys.argv[1:]]))
    pictures = draw(files, runs, found, charts_of(told), told.title)
    folders.write_file(files["html"], document(told).encode("utf-8", "backslashreplace"))
    if options.md:
        folders.write_file(files["md"], markdown(told, pictures).encode("utf-8", "backslashreplace"))
    print(f"Report: {', '.join(str(path) for path in files.values() if path.exists())}")


def draw(files: dict[str, Path], runs: list[Facts], found: list[Measured], charts: list, title: str) -> list[str]:
    """Draw the pictures that were asked for; returns their names."""
    if "curves" in files and charts:
        save_picture(files["curves"], draw_charts, charts, title)
    for facts, measured in zip(runs, found, strict=True):
        if facts.run.name in files and measured.changes:
            save_picture(files[facts.run.name], draw_sizes, measured.changes, f"What {facts.run.name} changes")
    return [path.name for kind, path in files.items() if kind not in ("html", "md") and path.exists()]


if __name__ == "__main__":
    run_command(main)
