"""The only writer of files that must not be lost: atomic files, committed folders, verified reads.

A folder is committed by: a temporary folder beside the target, each file written in parts and fsynced, a manifest with
SHA-256 digests written last, the temporary folder fsynced, a rename, and an fsync of the parent. A reader therefore
sees the whole folder or none of it, and `read_folder` refuses one whose bytes changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UsageError, UserError
from runtime.storage.content import PART, Content, OpenFile, parts_of, sha256

MANIFEST = "MANIFEST.json"
LARGE = ".safetensors"  # files of this kind are read where their bytes are needed, the others at once

Files = dict[str, bytes | Content]
"""The files of a folder: name to content."""


class CorruptedError(UserError):
    """A file on disk is not what was written: missing, cut short, or with other bytes."""


@contextmanager
def plain_errors(path: Path, verb: str, size: int = 0) -> Iterator[None]:
    """Turn an OSError into one line that names the file and, for a full disk, the way out.

    size: how many bytes are to be written, where that is known.
    """
    try:
        yield
    except OSError as error:
        fix = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            need = f"; {max(size, 1e5) / 1e6:,.1f} MB are needed there" if size else ""
            fix = f"{need}; free some space and start again, what was saved before is intact"
        raise UserError(f"could not {verb} {path}: {error.strerror or error}{fix}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where the system has that (Windows and some network drives do not)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents durably: a synced file is lost with a folder that was not."""
    if not folder.is_dir():
        if folder != folder.parent:  # as a drive is that is not there
            _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _write_synced(path: Path, data: bytes | Content) -> dict[str, int | str]:
    """Write a file durably; returns what the manifest says of it."""
    digest, length = hashlib.sha256(), 0
    with open(path, "wb", buffering=PART) as file:
        for part in parts_of(data):
            file.write(part)
            digest.update(part)
            length += len(part)
            del part  # which holds the tensor that it is of, while the next is made
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": length, "sha256": digest.hexdigest()}


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically: after a crash it holds the old bytes or the new ones.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with plain_errors(path, "write", len(data)):
        _make_folder(path.parent)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C as well as a full disk
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to a log, durably; used for metrics, where a torn last line costs only itself."""
    with plain_errors(path, "write"), open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _manifest(table: dict[str, dict[str, int | str]]) -> bytes:
    own = sha256(json.dumps(table, sort_keys=True).encode())
    return json.dumps({"files": dict(sorted(table.items())), "sha256": own}, indent=1).encode()


def commit_folder(folder: Path, files: Files) -> None:
    """Write `files` as `folder`, whole or not at all; an existing `folder` is an error.

    Raises UserError where the disk is full or the place cannot be written; the temporary folder is then removed.
    """
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    with plain_errors(folder, "save", sum(map(len, files.values()))):
        if folder.exists():  # a rename would take the place of an empty one
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        _make_folder(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            table = {name: _write_synced(temporary / name, data) for name, data in files.items()}
            _write_synced(temporary / MANIFEST, _manifest(table))
            sync_folder(temporary)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder.parent)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Name of each file -> its length and SHA-256."""
    try:
        _check_plain(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        table = manifest["files"]
        if sha256(json.dumps(table, sort_keys=True).encode()) != manifest["sha256"]:
            raise ValueError("its own digest does not match")
        return {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in table.items()}
    except FileNotFoundError:
        raise CorruptedError(f"{folder}: no {MANIFEST}, so this is not a finished save") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptedError(f"{folder / MANIFEST} is corrupted: {error}") from None


def _check_plain(path: Path, length: int | None = None) -> None:
    """Raises OSError for a link, which may lead anywhere, and for a device or a pipe, which may never end; ValueError
    for a file of another length."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    if length is not None and about.st_size != length:
        raise ValueError(f"{about.st_size:,} bytes long, and {length:,} were saved")


def read_content(path: Path) -> bytes | Content:
    """A file's content: held in memory, or left on the disk for a file of tensors."""
    return OpenFile(path.open("rb")) if path.suffix == LARGE else path.read_bytes()


def read_folder(folder: Path) -> Files:
    """All files of a committed folder, each checked against the manifest.

    Raises CorruptedError that names the first file that is missing or has other bytes than were written.
    """
    files: Files = {}
    for name, (length, digest) in _read_manifest(folder).items():
        path = folder / name
        if name in ("", "..") or Path(name).name != name or not name.isprintable():
            raise CorruptedError(f"{folder / MANIFEST} names {name!r}, which is no file of this folder")
        try:
            _check_plain(path, length)
            files[name] = read_content(path)
            intact = sha256(files[name]) == digest
        except OSError as error:
            raise CorruptedError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise CorruptedError(f"{path} is corrupted: {error}") from None
        if not intact:
            raise CorruptedError(f"{path} is corrupted: its checksum is not the one that was saved")
    return files


def publish_folder(folder: Path, target: Path) -> None:
    """Give a committed folder its final name, atomically."""
    with plain_errors(target, "save"):
        os.rename(folder, target)
        sync_folder(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote into `folder` left there; nobody may be writing now."""
    with plain_errors(folder, "read"):
        paths = list(folder.iterdir())
    for path in paths:
        if path.name.startswith(".tmp-") and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".tmp-") or path.name.startswith(".") and path.name.endswith(".tmp"):
            remove_file(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is no longer needed; one that cannot be removed is no reason to stop.

    It is moved out of sight first, so that nobody who reads meanwhile, or after a crash, finds half of it.
    """
    doomed = folder.with_name(f".tmp-removed-{folder.name}-{os.getpid()}")
    with suppress(OSError):
        os.rename(folder, doomed)
        folder = doomed
    shutil.rmtree(folder, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Remove a file that is no longer needed; one that cannot be removed is no reason to stop."""
    with suppress(OSError):
        path.unlink()


def check_free(path: Path) -> None:
    """Raises UsageError where there is something already."""
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already, and nothing is overwritten; choose another --out")


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder; for a name that the system cannot have, `Path.exists` would raise."""
    return os.path.exists(path)  # noqa: PTH110


def check_there(path: Path) -> None:
    """Raises UsageError where there is nothing."""
    if not is_there(path):
        raise UsageError(f"{path}: there is no such file or folder")


def check_writable(folder: Path) -> None:
    """Raises UserError where no results could be written into this folder later."""
    probe = folder / f".probe-{os.getpid()}.tmp"
    write_file(probe, b"")
    remove_file(probe)
