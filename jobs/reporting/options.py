"""The flags of `report.py`, and what of them goes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UsageError
from runtime.pictures import without_pictures
from runtime.settings.config import FOLDER, CommonSettings
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


def check_flags(options: Options) -> None:
    """Raises UsageError for what cannot be, before anything is read."""
    if len(set(options.runs)) < len(options.runs):
        raise UsageError(f"a run is named twice: {', '.join(options.runs)}")
    if options.png and (needed := without_pictures()):
        raise UsageError(f"--png: {needed}")
    for folder in options.evaluation:
        folders.check_there(Path(folder))
