"""File-system operations below one folder: counted, logged, and struck by a fault at the k-th of them.

Installed in a child process, where the code under test then runs unchanged. What is counted: opening for
reading or writing, each write, fsync, rename, replace, mkdir, unlink, rmdir, listing a folder. Looking whether a file
exists is not.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from pathlib import Path

READS = ("read", "list")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
MODES = ("kill", "torn", *ERRORS)


def applies(mode: str, operation: str) -> bool:
    """Whether this fault can happen there: a full disk does not stop anybody from reading."""
    return mode != "ENOSPC" or operation not in READS


class FaultyDisk:
    """Counts what happens below `root` in `log`, and strikes at operation `k` (from 1; 0 is never).

    `kill` ends the process before the operation. `torn` ends it as a power cut might: a write is done by half, and
    whatever was not synced is cut to half of what was written to it. `ENOSPC` and `EIO` fail the operation, a write
    after half of it. `told` is called right before a strike.
    """

    def __init__(self, root: Path, k: int = 0, mode: str = "kill", told=lambda: None) -> None:
        self.root, self.k, self.mode, self.told = f"{root}{os.sep}", k, mode, told
        self.log: list[tuple[str, str, str]] = []  # operation, path, and where a rename leads
        self.unsynced: dict[str, int] = {}  # path -> how long the file was when it was last safe
        self.real_open = builtins.open

    def operation(self, name: str, path: str, target: str = "") -> None:
        """One more operation; strikes if it is the k-th."""
        if path.startswith(self.root):
            self.log.append((name, path.removeprefix(self.root), target.removeprefix(self.root)))
            if len(self.log) == self.k and name != "write":
                self.strike()

    def strike(self) -> None:
        self.told()
        if self.mode in ERRORS:
            raise OSError(ERRORS[self.mode], os.strerror(ERRORS[self.mode]), self.root + self.log[-1][1])
        if self.mode == "torn":
            for path, safe in self.unsynced.items():
                if Path(path).is_file():
                    os.truncate(path, safe + (Path(path).stat().st_size - safe) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Stand in for the system's operations, in this process for good."""
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "fsync", "listdir", "scandir"):
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        os.open = self.wrapped_os_open(os.open)
        builtins.open = io.open = self.open

    def wrapped(self, name: str, original):
        said = {"listdir": "list", "scandir": "list", "remove": "unlink"}.get(name, name)

        def operation(first=".", *args, **kwargs):
            path = whereabouts(first, kwargs.get("dir_fd") or kwargs.get("src_dir_fd"))
            target = whereabouts(args[0], kwargs.get("dst_dir_fd")) if name in ("rename", "replace") else ""
            self.operation(said, path, target)
            result = original(first, *args, **kwargs)
            if name == "fsync":
                self.unsynced.pop(path, None)
            elif target:
                self.moved(path, target)
            return result

        return operation

    def wrapped_os_open(self, original):
        def os_open(path, flags, *args, **kwargs):
            writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.operation("open" if writing else "read", whereabouts(path, kwargs.get("dir_fd")))
            return original(path, flags, *args, **kwargs)

        return os_open

    def moved(self, old: str, new: str) -> None:
        inside = [path for path in self.unsynced if path == old or path.startswith(f"{old}{os.sep}")]
        self.unsynced |= {new + path.removeprefix(old): self.unsynced.pop(path) for path in inside}

    def open(self, file, mode="r", buffering=-1, *args, **kwargs):
        path = "" if isinstance(file, int) else whereabouts(file)
        writing = not set(mode).isdisjoint("wax+")
        self.operation("open" if writing else "read", path)
        if not (writing and path.startswith(self.root)):
            return self.real_open(file, mode, buffering, *args, **kwargs)
        assert "b" in mode, "what must not be lost is written as bytes"
        torn = TornFile(path, mode.replace("b", ""), self)
        self.unsynced[path] = Path(path).stat().st_size
        return io.BufferedWriter(torn, buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE)


class TornFile(io.FileIO):
    """A file whose write can be struck half-way."""

    def __init__(self, path: str, mode: str, disk: FaultyDisk) -> None:
        super().__init__(path, mode)
        self.path, self.disk = path, disk

    def write(self, data) -> int:
        self.disk.operation("write", self.path)
        if len(self.disk.log) == self.disk.k:
            if self.disk.mode != "kill":
                super().write(data[: len(data) // 2])
            self.disk.strike()
        return super().write(data)


def whereabouts(path, folder: int | None = None) -> str:
    """The absolute path of what an operation names: a path, an open file, or a name in an open folder."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    return str((Path(f"/proc/self/fd/{folder}").readlink() if folder is not None else Path.cwd()) / os.fsdecode(path))
