"""A fingerprint is computed once for the same files, and again when one of them may have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.pretrained import fingerprints
from models.pretrained.fingerprints import known_fingerprint

OLD = 1_600_000_000


class Counted:
    """A fingerprint that takes long: `times` says how often it was computed."""

    times = 0

    def __call__(self) -> str:
        self.times += 1
        return f"{self.times:064x}"


@pytest.fixture
def paths(tmp_path: Path, monkeypatch) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SETTLED", -1.0)  # a file's ctime cannot be set to long ago
    found = [tmp_path / "config.json", tmp_path / "model.safetensors"]
    for path in found:
        path.write_text(path.name)
    return found


def test_the_same_files_are_read_once(paths: list[Path]) -> None:
    compute = Counted()
    assert known_fingerprint(paths, compute) == known_fingerprint(paths, compute) == f"{1:064x}"
    assert compute.times == 1


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("how", ["other bytes, as long", "other times", "another file"])
def test_a_file_that_may_have_changed_is_read_again(paths: list[Path], changed: int, how: str) -> None:
    compute, path = Counted(), paths[changed]
    known_fingerprint(paths, compute)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if how == "other bytes, as long":
        path.write_text(path.name[::-1])
        os.utime(path, ns=times)  # as cp -p and rsync set them back
    elif how == "other times":
        os.utime(path, (OLD, OLD))
    else:
        path.rename(path.with_suffix(".old"))
        path.write_text(path.name)
        os.utime(path, ns=times)
    known_fingerprint(paths, compute)
    assert compute.times == 2


def test_a_file_that_was_written_just_now_is_not_trusted(paths: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED", 60.0)
    compute = Counted()
    known_fingerprint(paths, compute), known_fingerprint(paths, compute)
    assert compute.times == 2


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"z" * 64, b"a" * 63])
def test_a_torn_or_missing_cache_is_done_without(paths: list[Path], content: bytes, tmp_path: Path) -> None:
    compute = Counted()
    known_fingerprint(paths, compute)
    (kept,) = (tmp_path / "cache").rglob("fingerprints/*")
    kept.write_bytes(content)
    assert known_fingerprint(paths, compute) == known_fingerprint(paths, compute) == f"{2:064x}"
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file in the place of the folder")
    assert known_fingerprint(paths, compute) == f"{3:064x}"
