"""Uploads beside the work: one at a time, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Newest:
    """Runs what it is offered on another thread, one at a time; of what has to wait, only the newest is run."""

    def __init__(self) -> None:
        self._waiting: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def offer(self, work: Callable[[], None]) -> None:
        """Run this as soon as nothing else runs. It must not raise."""
        with self._lock:
            self._waiting = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)  # which keeps no process from ending
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether something runs."""
        return self._thread is not None

    def end(self) -> None:
        """Wait for what runs, and forget what waits."""
        with self._lock:
            self._waiting, thread = None, self._thread
        if thread:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                work, self._waiting = self._waiting, None
                if work is None:
                    self._thread = None
                    return
            work()
