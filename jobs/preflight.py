"""What a run will need later, checked before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.corpora import CORPORA, Corpus
from jobs.job import Job
from runtime import report
from runtime.console import say
from runtime.errors import UserError

REPEATED = 0.9  # of the held-out lines, from which on their loss says little about other text
PER_WEIGHT = 3 * 4  # bytes of a trained weight and AdamW's two moments, in fp32


def preflight(job: Job) -> None:
    """Raises UserError where there is no room for what the run will save; warns where validation will say little.

    That the runs' folder can be written is known once `claim` has written run.json there, and that the text is long
    enough once `TextData` has been made.
    """
    check_room(job, Path(job.settings.checkpoints_dir))
    if job.settings.dataset not in CORPORA and (share := repeated_share(job.data.corpus)) > REPEATED:
        say(
            f"warning: {100 * share:.0f} % of the held-out lines of {job.data.name} are in its training text too, "
            "so its validation loss says little about other text"
        )


def check_room(job: Job, root: Path) -> None:
    """Raises UserError where the disk of `root` has less room than the saves take that are kept at a time."""
    s = job.settings
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    kept = min(s.keep_checkpoints, -(-s.max_iters // s.save_interval)) + 1  # a new one is whole before an old one goes
    best = 2 * 4 * (trained if job.kind == "lora" else sum(p.numel() for p in job.model.parameters()))
    need = kept * PER_WEIGHT * trained + best
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < need:
        raise UserError(
            f"{root}: the run will save up to {report.size(need)} at a time, and {report.size(free)} are free; "
            f"free some space, choose another CHECKPOINTS_DIR, or lower KEEP_CHECKPOINTS={s.keep_checkpoints}"
        )


def repeated_share(corpus: Corpus) -> float:
    """The share of the held-out lines, from 0 to 1, that stand in the training text word for word."""
    lines = [line for line in map(str.strip, corpus.validation.split("\n")) if line]
    known = {line.strip() for line in corpus.train.split("\n")}
    whole = len(lines) == 1 and lines[0] in corpus.train
    return 1.0 if whole else sum(line in known for line in lines) / max(1, len(lines))
