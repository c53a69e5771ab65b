"""Which runs were trained on which: a base is known by the fingerprint of its weights, whatever it is called now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.runs.base import TOKENIZER, tokenizer_in
from models.files import stored_fingerprint
from runtime.errors import UserError
from runtime.storage import folders
from runtime.storage.content import sha256
from runtime.storage.runs import Run, RunLock, open_run


@dataclass(frozen=True)
class Family:
    """The runs of a folder, the newest last; the names of those with weights by their fingerprint, and the kinds of
    their tokenizers by theirs."""

    runs: Sequence[Run]
    bases: dict[str, list[str]]
    tokenizers: dict[str, str]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Family:
        """Read the weights of each run that may serve as a base; one that cannot be read serves nobody."""
        bases: dict[str, list[str]] = {}
        tokenizers: dict[str, str] = {}
        for run in runs:
            with suppress(UserError, KeyError):
                if run.kind != "lora":
                    files = run.read()
                    bases.setdefault(stored_fingerprint(files, str(run.artifact)), []).append(run.name)
                    tokenizers[sha256(files[TOKENIZER])] = tokenizer_in(files, str(run.artifact)).kind
        return cls(runs, bases, tokenizers)

    def base_of(self, run: Run) -> str | None:
        """The run that this one was trained on, or another with the same weights; None where there is none here."""
        if not (base := run.metadata.get("base")):
            return None
        names = [name for name in self.bases.get(base.get("sha256"), []) if name != run.name]
        return base["run"] if base["run"] in names else names[0] if names else None

    def trained_on(self, base: Run | None) -> list[Run]:
        """The runs that were trained on this one; without one, those on none and on one in another folder."""
        if base is None:
            orphans = self.orphans()
            return [run for run in self.runs if self.base_of(run) is None and run not in orphans]
        return [run for run in self.runs if self.base_of(run) == base.name]

    def orphans(self) -> list[Run]:
        """The adapters whose base is neither here nor where it was: nothing can be done with them."""
        alone = [run for run in self.runs if run.kind == "lora" and self.base_of(run) is None]
        return [run for run in alone if not (path := run.metadata["base"].get("path")) or open_run(Path(path)) is None]


def orphaned_by(removed: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """The adapters that would have no base any more without these runs."""
    family, gone = Family.of(runs), {run.name for run in removed}
    left = Family.of([run for run in runs if run.name not in gone])
    before = {run.name for run in family.orphans()}
    return [run for run in left.orphans() if run.name not in before]


def remove_runs(runs: Sequence[Run]) -> None:
    """Remove runs for good. Raises UserError, with all of them still there, where one is being trained."""
    for run in runs:
        with RunLock(run.folder):
            pass
    for run in runs:
        draft = run.folder.with_name(f".tmp-removed-{run.name}-{os.getpid()}")
        folders.publish_folder(run.folder, draft)  # at once out of sight, so that nobody ever finds half of it
        folders.remove_folder(draft)
