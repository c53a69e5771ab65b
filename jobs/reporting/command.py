"""What `report.py` does: reads, measures, and writes the page and what goes beside it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from jobs.adapting.plots import draw_sizes
from jobs.reporting.beside import page
from jobs.reporting.facts import Facts, read_facts
from jobs.reporting.measuring import Measured, Wish, measure
from jobs.reporting.options import Options
from jobs.reporting.writers.html import document
from jobs.reporting.writers.markdown import markdown
from jobs.reporting.writers.plots import charts_of, draw_charts
from runtime.device import pick_machine
from runtime.pictures import save_picture
from runtime.storage import folders


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
            folders.check_free(path)
    else:
        name = runs[0].run.name + (f"-and-{len(runs) - 1}-more" if len(runs) > 1 else "") + "-report"
        stems = (Path(f"{name}{f'-{i}' if i > 1 else ''}") for i in range(1, 10**6))
        found = next(found for stem in stems if not any(map(os.path.lexists, (found := beside(stem)).values())))
    folders.check_writable(found["html"].absolute().parent)
    return found


def draw(files: dict[str, Path], runs: list[Facts], found: list[Measured], charts: list, title: str) -> list[str]:
    """Draw the pictures that were asked for; returns their names."""
    if "curves" in files and charts:
        save_picture(files["curves"], draw_charts, charts, title)
    for facts, measured in zip(runs, found, strict=True):
        if facts.run.name in files and measured.changes:
            save_picture(files[facts.run.name], draw_sizes, measured.changes, f"What {facts.run.name} changes")
    return [path.name for kind, path in files.items() if kind not in ("html", "md") and path.exists()]


def run(options: Options) -> None:
    """What `report.py` does."""
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
