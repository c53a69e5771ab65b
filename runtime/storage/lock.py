"""One process at a time in a run's folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import filelock

from runtime.errors import UserError
from runtime.storage import folders


class RunLock:
    """Keeps a second run out of a run's folder while this one writes; the system drops it with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, filelock.FileLock(folder / ".lock", timeout=0)
        self.holder = folder / ".lock-holder"

    def __enter__(self) -> None:
        with folders.plain_errors(self.holder, "write"):
            try:
                self.lock.acquire()
            except filelock.Timeout:
                name, holder = self.folder.name, self._holder()
                raise UserError(
                    f"run {name} is being trained by {holder}; wait for it, or choose another RUN_NAME"
                ) from None
        try:
            folders.write_file(self.holder, f"process {os.getpid()}".encode())
            folders.remove_leftovers(self.folder)
        except BaseException:
            self.lock.release()
            raise

    @property
    def held(self) -> bool:
        """Whether a process writes into the folder just now."""
        if not self.holder.exists():
            return False
        try:
            with self.lock:  # a process that was killed leaves its note and loses the lock
                return False
        except filelock.Timeout:
            return True
        except OSError:  # somebody else's folder: the note is all that there is
            return True

    def _holder(self) -> str:
        """Who holds the lock, if that is known: the note is written right after the lock is taken."""
        with suppress(OSError):
            if self.holder.is_file():
                return self.holder.read_bytes()[:100].decode("utf-8", "replace")
        return "another process"

    def __exit__(self, *_: object) -> None:
        try:
            folders.remove_file(self.holder)
            folders.remove_leftovers(self.folder)  # of removals that failed
        finally:
            self.lock.release()
