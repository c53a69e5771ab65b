"""Files that must not be lost: whole or not at all under every fault, and never read with other bytes."""

from __future__ import annotations

import builtins
import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.errors import UserError
from runtime.storage import folders
from runtime.storage.content import sha256
from runtime.storage.folders import MANIFEST, CorruptedError, commit_folder, read_folder, write_file

FILES = {"weights.bin": bytes(range(40)), "empty": b"", "state.json": b'{"step": 3}'}
POSIX = pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced on Windows")


class TornFile:
    """A file whose write stops half-way when a fault strikes."""

    def __init__(self, file, strike) -> None:
        self.file, self.strike = file, strike

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.strike("write")
        self.file.write(data[: len(data) // 2])
        self.strike("write")
        self.file.write(data[len(data) // 2 :])


class Disk:
    """Logs the file-system operations of `storage`, and lets the k-th of them fail."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.k, self.error = [], 0, errno.ENOSPC
        for name in ("fsync", "rename", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.logged(name, getattr(os, name)))
        monkeypatch.setattr(folders, "open", self.open, raising=False)

    def fail(self, k: int, error: int = errno.ENOSPC) -> None:
        """Let the k-th operation from now on fail, counted from 1; 0 is none."""
        self.log, self.k, self.error = [], k, error

    def strike(self, name: str, *what: object) -> None:
        self.log.append((name, *what))
        if len(self.log) == self.k:
            raise OSError(self.error, os.strerror(self.error))

    def logged(self, name: str, original):
        def wrapped(first, *args, **kwargs):
            self.strike(name, os.fstat(first).st_ino if name == "fsync" else Path(first))
            return original(first, *args, **kwargs)

        return wrapped

    def open(self, path, mode="r", *args, **kwargs):
        self.strike("open", Path(path))
        return TornFile(builtins.open(path, mode, *args, **kwargs), self.strike)

    def synced(self) -> list[int]:
        """The inodes that were synced, in order."""
        return [what for name, *rest in self.log for what in rest if name == "fsync"]


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def refused(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert str(caught.value).isprintable(), "one line"
    return str(caught.value)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get)
def test_a_file_keeps_its_old_bytes_whichever_operation_fails(tmp_path, disk, error):
    path = tmp_path / "run.json"
    write_file(path, b"old" * 9)
    assert path.read_bytes() == b"old" * 9
    disk.fail(0)
    write_file(path, b"old" * 9)
    replaced = [name for name, *_ in disk.log].index("replace") + 1
    for k in range(1, len(disk.log) + 1):
        write_file(path, b"old" * 9)
        disk.fail(k, error)
        message = refused(write_file, path, b"new" * 8)
        assert str(path) in message and os.strerror(error) in message
        assert ("free some space" in message) == (error != errno.EACCES)
        assert path.read_bytes() == (b"old" * 9 if k <= replaced else b"new" * 8)
        assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    disk.fail(0)
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_folder_is_committed_whole_or_not_at_all_whichever_operation_fails(tmp_path, disk, error):
    commit_folder(tmp_path / "counted", FILES)
    names = [name for name, *_ in disk.log]
    renamed = names.index("rename") + 1
    assert names.count("write") == 2 * (len(FILES) + 1), "every file and the manifest go through the faulty disk"
    for k in range(1, len(names) + 1):
        folder = tmp_path / f"{k}" / "step-000003"
        folder.parent.mkdir()
        disk.fail(k, error)
        message = refused(commit_folder, folder, FILES)
        assert str(folder) in message and ("free some space" in message) == (error == errno.ENOSPC)
        disk.fail(0)
        if k <= renamed:
            assert not list(folder.parent.iterdir()), "neither the folder nor a temporary one"
            commit_folder(folder, FILES)
        assert read_folder(folder) == FILES


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit_folder(tmp_path / "step-000001", FILES)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "run.json", b"{}")
    assert not list(tmp_path.iterdir())


@POSIX
def test_each_file_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, disk):
    folder = tmp_path / "step-000001"
    commit_folder(folder, FILES)
    inode = {path.name: path.stat().st_ino for path in folder.iterdir()}
    before = [inode[name] for name in FILES] + [inode[MANIFEST], folder.stat().st_ino]
    assert disk.synced() == [*before, tmp_path.stat().st_ino]
    events = [name for name, *_ in disk.log if name in ("fsync", "rename")]
    assert events == ["fsync"] * len(before) + ["rename", "fsync"]
    disk.fail(0)
    write_file(tmp_path / "run.json", b"{}")
    assert disk.synced() == [(tmp_path / "run.json").stat().st_ino, tmp_path.stat().st_ino]
    assert [name for name, *_ in disk.log if name in ("fsync", "replace")] == ["fsync", "replace", "fsync"]


@POSIX
@pytest.mark.parametrize("write", [lambda p: write_file(p, b"{}"), lambda p: commit_folder(p, FILES)])
def test_folders_made_on_the_way_are_durable_too(tmp_path, disk, write):
    write(tmp_path / "checkpoints" / "base" / "saved")
    parents = {path.stat().st_ino for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "base")}
    assert parents <= set(disk.synced())


@POSIX
def test_a_file_system_that_cannot_sync_folders_is_no_reason_to_stop(tmp_path, monkeypatch):
    real = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    commit_folder(tmp_path / "saved", FILES)
    write_file(tmp_path / "run.json", b"{}")
    assert read_folder(tmp_path / "saved") == FILES


def test_windows_has_no_sync_of_folders(tmp_path, monkeypatch):
    opened = []
    system = SimpleNamespace(**vars(os))
    system.name, system.open = "nt", lambda *args: opened.append(args)
    monkeypatch.setattr(folders, "os", system)
    commit_folder(tmp_path / "saved", FILES)
    assert read_folder(tmp_path / "saved") == FILES and not opened


def what_is_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_target_is_an_error_and_stays_as_it_is(tmp_path):
    folder = tmp_path / "saved"
    commit_folder(folder, FILES)
    before = what_is_in(folder)
    assert str(folder) in refused(commit_folder, folder, {"other": b"bytes"})
    assert what_is_in(folder) == before and list(tmp_path.iterdir()) == [folder]
    (empty := tmp_path / "empty").mkdir()
    (file := tmp_path / "file").write_bytes(b"somebody's")
    for target in (empty, file):
        assert str(target) in refused(commit_folder, target, FILES)
    assert not list(empty.iterdir()) and file.read_bytes() == b"somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "saved"]


def test_a_folder_that_is_published_keeps_its_bytes_and_takes_nobody_else_s_place(tmp_path):
    commit_folder(tmp_path / "best", FILES)
    folders.publish_folder(tmp_path / "best", tmp_path / "model")
    assert read_folder(tmp_path / "model") == FILES and not (tmp_path / "best").exists()
    commit_folder(tmp_path / "best", {"other": b"bytes"})
    assert "model" in refused(folders.publish_folder, tmp_path / "best", tmp_path / "model")
    assert read_folder(tmp_path / "model") == FILES and read_folder(tmp_path / "best") == {"other": b"bytes"}


def test_leftovers_of_a_killed_process_are_cleared_and_nothing_else(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        patched.setattr(os, "rename", killed)
        patched.setattr(os, "replace", killed)
        for write in (lambda: commit_folder(tmp_path / "step-000001", FILES), lambda: write_file(tmp_path / "a", b"")):
            with pytest.raises(SystemExit):
                write()
    assert len(list(tmp_path.iterdir())) == 2
    write_file(tmp_path / "metrics.jsonl", b"")
    commit_folder(tmp_path / "step-000002", FILES)
    (tmp_path / ".lock").touch()
    folders.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "step-000002"]


def test_lines_are_appended_with_one_kind_of_line_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    folders.append_lines(path, "é\n")
    folders.append_lines(path, "two\n")
    assert path.read_bytes() == "é\ntwo\n".encode()
    assert "nowhere" in refused(folders.append_lines, tmp_path / "nowhere" / "log", "x\n")


# --- reading --------------------------------------------------------------------------------------------------------


def corrupted_or_same(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether reading was refused, naming the folder in one line; else it must have given the true bytes."""
    try:
        assert read_folder(folder) == files
    except CorruptedError as error:
        assert str(folder) in str(error) and str(error).isprintable() and error.status == 1
        return True
    return False


@pytest.fixture
def saved(tmp_path) -> Path:
    commit_folder(tmp_path / "saved", FILES)
    return tmp_path / "saved"


@pytest.fixture
def small(tmp_path, monkeypatch) -> tuple[Path, dict[Path, bytes]]:
    """A small committed folder, and what its files are read as from now on: thousands of damages need no disk."""
    folder = tmp_path / "small"
    commit_folder(folder, {"a.bin": b"weights"})
    disk = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Path, "read_bytes", lambda path: disk[path])
    return folder, disk


@pytest.mark.parametrize("name", ["a.bin", MANIFEST])
def test_no_flipped_bit_is_read_as_something_else(small, name):
    folder, disk = small
    good, refusals = disk[folder / name], 0
    for i in range(len(good) * 8):
        disk[folder / name] = good[: i // 8] + bytes([good[i // 8] ^ 1 << i % 8]) + good[i // 8 + 1 :]
        refusals += corrupted_or_same(folder, {"a.bin": b"weights"})
    assert refusals == len(good) * 8 or name == MANIFEST and refusals > len(good) * 7


@pytest.mark.parametrize("name", ["a.bin", MANIFEST])
def test_no_file_is_read_cut_short_or_with_more_at_its_end(small, name):
    folder, disk = small
    good = disk[folder / name]
    for data in (*(good[:length] for length in range(len(good))), good + b"\0", good + good):
        disk[folder / name] = data
        assert corrupted_or_same(folder, {"a.bin": b"weights"})


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused(saved, name):
    path = saved / name
    path.unlink()
    assert corrupted_or_same(saved, FILES)
    path.mkdir()
    assert corrupted_or_same(saved, FILES)


def test_a_checksum_refusal_names_the_file(saved):
    (saved / "weights.bin").write_bytes(b"other")
    with pytest.raises(CorruptedError, match=r"weights\.bin is corrupted: 5 bytes long, and 40 were saved"):
        read_folder(saved)
    (saved / "weights.bin").write_bytes(b"other" * 8)
    with pytest.raises(CorruptedError, match=r"weights\.bin is corrupted.*checksum"):
        read_folder(saved)
    (saved / MANIFEST).unlink()
    with pytest.raises(CorruptedError, match="not a finished save"):
        read_folder(saved)
    with pytest.raises(CorruptedError, match="nowhere"):
        read_folder(saved / "nowhere")


def forged(table: object) -> bytes:
    """A manifest whose own digest is right."""
    return json.dumps({"files": table, "sha256": sha256(json.dumps(table, sort_keys=True).encode())}).encode()


def entry(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": sha256(data)}


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'"files"',
        b"{}",
        b"\xff\xfe\x00",
        b'{"files": {}}',
        b"[" * 100_000,
        b'{"files": ' * 50_000 + b"}" * 50_000,
        b'{"files": ' + b"9" * 5_000 + b', "sha256": ""}',
        forged([]),
        forged(None),
        forged({"weights.bin": None}),
        forged({"weights.bin": "text"}),
        forged({"weights.bin": {"bytes": 40}}),
    ],
    ids=range(16),
)
def test_a_manifest_that_makes_no_sense_is_refused(saved, manifest):
    (saved / MANIFEST).write_bytes(manifest)
    assert corrupted_or_same(saved, FILES)


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "sub/x", "/dev/null", "a\0b", "a\nb", "\ud800", "x" * 5_000])
def test_a_manifest_cannot_name_what_is_not_in_the_folder(saved, name):
    (saved.parent / "x").write_bytes(b"secret")
    (saved / "sub").mkdir()
    (saved / "sub" / "x").write_bytes(b"secret")
    for data in (b"secret", b""):
        (saved / MANIFEST).write_bytes(forged({name: entry(data)}))
        assert corrupted_or_same(saved, FILES)


def test_keys_and_files_that_came_later_change_nothing(saved):
    table = {name: entry(data) | {"later": [1]} for name, data in FILES.items()}
    (saved / MANIFEST).write_bytes(json.dumps(json.loads(forged(table)) | {"version": 2}).encode())
    (saved / "notes.txt").write_text("a stranger's")
    assert read_folder(saved) == FILES
