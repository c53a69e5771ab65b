"""Files that can be made again: kept in a committed folder, checked whenever they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.console import say
from runtime.errors import UserError
from runtime.storage.folders import CorruptedError, commit_folder, read_folder, remove_folder


def cached(folder: Path, build: Callable[[], dict[str, bytes]], parse: Callable[[dict[str, bytes]], Any]) -> Any:
    """What `parse` makes of the files (name to bytes) of a committed folder: read where it exists and is sound, else
    built and saved there. `parse` raises KeyError or ValueError for files that `build` did not make.

    A corrupted folder is built again, and a cache that cannot be written is done without; both are said on stderr.
    """
    if folder.exists():
        try:
            return parse(read_folder(folder))
        except CorruptedError as error:
            say(f"{error}; making it again")
        except (KeyError, ValueError) as error:
            say(f"{folder} does not hold what it should ({error}); making it again")
        remove_folder(folder)
    files = build()
    try:
        commit_folder(folder, files)
    except UserError as error:
        if not folder.exists():  # else another process was faster, with the same bytes
            say(f"{error}; going on without this cache")
    return parse(files)
