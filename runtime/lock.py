"""One process at a time in a run's folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import filelock

from runtime import storage
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.checkpoint import Run


class RunLock:
    """Keeps a second run out of a run's folder while this one writes; the system drops it with the process."""

    def __init__(self, run: Run) -> None:
        self.run, self.lock = run, filelock.FileLock(run.folder / ".lock", timeout=0)
        self.holder = run.folder / ".lock-holder"

    def __enter__(self) -> None:
        with storage.plain_errors(self.holder, "write"):
            try:
                self.lock.acquire()
                self.holder.write_text(f"process {os.getpid()}")
            except filelock.Timeout:
                holder = self.holder.read_text() if self.holder.exists() else "another process"
                raise UserError(
                    f"run {self.run.name} is being trained by {holder}; wait for it, or choose another RUN_NAME"
                ) from None
            except OSError:
                self.lock.release()
                raise
            storage.remove_leftovers(self.run.folder)

    def __exit__(self, *_: object) -> None:
        self.holder.unlink(missing_ok=True)
        self.lock.release()
