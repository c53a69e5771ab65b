"""What a run will need later, checked before its first step."""

from __future__ import annotations

import shutil

from data.corpora import CORPORA, Corpus
from data.text import TextData
from jobs.runs.job import Job
from runtime import report
from runtime.console import say
from runtime.errors import UserError
from runtime.storage.runs import Run

PIECES, PIECE = 20, 50  # of the held-out text that are looked up, at most; characters of one
REPEATED = 0.9  # of the pieces, from which on the loss says little about other text
PER_WEIGHT = 3 * 4  # bytes of a trained weight and AdamW's two moments, in fp32


def preflight(job: Job, run: Run) -> None:
    """Raises UserError where there is no room for what the run will save; warns where validation will say little.

    That the runs' folder can be written is known once `claim` has written run.json there, and that the text is long
    enough once `TextData` has been made.
    """
    check_room(job, run)
    own_text = isinstance(job.data, TextData) and job.settings.dataset not in CORPORA
    if own_text and (share := repeated_share(job.data.corpus)) > REPEATED:
        say(
            f"warning: {100 * share:.0f} % of what is held out of {job.data.name} is in its training text too, "
            "so its validation loss says little about other text"
        )


def check_room(job: Job, run: Run) -> None:
    """Raises UserError where the disk has less room than the saves take that are kept at a time, beside those that
    the run has made already."""
    s = job.settings
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    kept = min(s.keep_checkpoints, -(-s.max_iters // s.save_interval)) + 1  # a new one is whole before an old one goes
    best = 2 * 4 * (trained if job.kind == "lora" else sum(p.numel() for p in job.model.parameters()))
    need = kept * PER_WEIGHT * trained + best
    need -= sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    if (free := shutil.disk_usage(run.folder).free) < need:
        raise UserError(
            f"{run.folder}: the run will save up to {report.size(need)} more at a time, and {report.size(free)} are "
            f"free; free some space, choose another CHECKPOINTS_DIR, or lower KEEP_CHECKPOINTS={s.keep_checkpoints}"
        )


def repeated_share(corpus: Corpus) -> float:
    """The share, from 0 to 1, of pieces of the held-out text that stand in the training text word for word."""
    text, pieces = corpus.validation, min(PIECES, max(1, len(corpus.validation) // PIECE))
    starts = [i * max(0, len(text) - PIECE) // max(1, pieces - 1) for i in range(pieces)]
    return sum(text[start : start + PIECE] in corpus.train for start in starts) / pieces
