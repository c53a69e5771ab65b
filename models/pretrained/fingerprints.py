"""The fingerprint of a pretrained base, computed once for the same files: hashing gigabytes takes seconds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from runtime.errors import UserError
from runtime.storage.folders import write_file

FORM = 1  # to be raised when the same files come to have another fingerprint
SETTLED = 2.0  # seconds after which a file's times tell that it was written again, on file systems with coarse clocks


def _cache_folder() -> Path:
    """Where programs keep what they can make again, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano-gpt-lora" / "fingerprints"


def _identity(paths: Sequence[Path]) -> str | None:
    """What tells these files from others and from what they were before; None where one was written just now."""
    found = []
    for path in paths:
        about = path.stat()
        if time.time() - max(about.st_mtime, about.st_ctime) < SETTLED:
            return None
        times = about.st_mtime_ns, about.st_ctime_ns
        found.append([str(path.resolve()), about.st_dev, about.st_ino, about.st_size, *times])
    return hashlib.sha256(json.dumps([FORM, found]).encode()).hexdigest()


def known_fingerprint(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """The fingerprint (64 hex digits) of a model in these files, as it was computed last time, else computed and kept.

    A cache that cannot be read or written is done without.
    """
    identity = _identity(paths)
    if identity is None:
        return compute()
    place = _cache_folder() / identity
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", known := place.read_text()):
            return known
    found = compute()
    with suppress(UserError):
        write_file(place, found.encode())
    return found
