"""What a run's trackers are told beside its figures: settings at its start, and at its end texts and the card."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.exporting.leaving import CARD, without_folders
from jobs.runs.job import Job
from runtime.processes.world import world
from runtime.settings.fields import settings_of
from runtime.storage.runs import Run
from runtime.tracking.tracking import Tracking


def tracking_of(job: Job, run: Run) -> Tracking:
    """The trackers of a run, as TRACK says; of several processes the first alone has any. Folders of the machine are
    left out of the settings, which may go to a server."""
    s = job.settings
    told = {row.name: row.shown(getattr(s, row.name)) for row in settings_of(type(s)) if row.identity}
    told |= {"dataset": without_folders(s.dataset), "template": Path(s.template).name, "machine": str(job.machine)}
    told |= {"base": job.base.run.name} if job.base else {}
    return Tracking(s.trackers if world().leads else (), run.folder, told)


def track_end(tracking: Tracking, run: Run, samples: Mapping[str, str | Sequence[str]]) -> None:
    """Hand over samples by title, and the card where what was trained has one."""
    if not tracking.active:
        return
    for title, texts in samples.items():
        for i, text in enumerate([texts] if isinstance(texts, str) else texts or ()):
            number = "" if isinstance(texts, str) else f" {i + 1}"
            tracking.text(f"sample{number} {title}".strip(), textwrap.indent(text, "    ", lambda line: True))
    if card := run.read().get(CARD):
        tracking.text("card", bytes(card).decode("utf-8", "replace"))
