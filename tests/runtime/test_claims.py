"""Which folder a run gets: names, identities, runs that stand there already, and the lock on them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UsageError, UserError
from runtime.storage import folders
from runtime.storage.encoding import to_json
from runtime.storage.folders import CorruptedError
from runtime.storage.lock import RunLock
from runtime.storage.runs import Run, all_runs, claim, find_run, identity_of, open_run

ROOT = Path(__file__).resolve().parents[2]


def about(identity: str = "0123456789ab", kind: str = "base") -> dict:
    settings, base = {"test_mode": False, "dataset": "folio"}, {"run": "base"} if kind != "base" else None
    return {"kind": kind, "identity": identity, "settings": settings, "base": base}


OTHER = about("ba9876543210")


def made(root: Path, name: str, when: int = 0, **changes) -> Run:
    """A run folder, last written to `when` seconds after an epoch."""
    folders.write_file(root / name / "run.json", to_json(about(**changes)))
    os.utime(root / name / "run.json", (when, when))
    return open_run(root / name)


def finish(run: Run, written: int, ended: int) -> None:
    """Give the run its product, written before the run ended."""
    run.save("best", 1, {"weights": b"w"}, keep=1)
    os.utime(run.folder / "best-000001", (written, written))
    run.publish({})
    os.utime(run.folder / "result.json", (ended, ended))


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_run_when_it_says_so(tmp_path):
    run = made(tmp_path, "base-x")
    assert (run.name, run.kind, run.metadata, run.folder) == ("base-x", "base", about(), tmp_path / "base-x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert [open_run(tmp_path / name) for name in ("empty", "file", "nowhere")] == [None] * 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", '{"kind": "base"}', '{"kind": "tree", "identity": "a"}', '{"kind": [], "identity": "a"}',
     '{"kind": "base", "identity": 3}', "[" * 100_000],
)  # fmt: skip
def test_a_corrupted_description_is_refused_by_name_and_left_out_of_the_list(tmp_path, capsys, text):
    made(tmp_path, "before")
    made(tmp_path, "later", when=9)
    (tmp_path / "corrupted").mkdir()
    (tmp_path / "corrupted" / "run.json").write_text(text)
    with pytest.raises(CorruptedError, match=r"corrupted.run\.json is corrupted") as caught:
        open_run(tmp_path / "corrupted")
    assert str(caught.value).isprintable()
    assert [run.name for run in all_runs(tmp_path)] == ["before", "later"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "corrupted" in told[0] and "leaving that run out" in told[0]


def test_an_unreadable_description_is_a_line_and_left_out_too(tmp_path, monkeypatch, capsys):
    made(tmp_path, "mine")
    made(tmp_path, "root-s")
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.parent.name == "root-s":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match="could not read .*root-s"):
        open_run(tmp_path / "root-s")
    assert [run.name for run in all_runs(tmp_path)] == ["mine"] and "root-s" in capsys.readouterr().err


def test_runs_are_listed_by_when_they_ended_or_else_began(tmp_path):
    assert all_runs(tmp_path / "nowhere") == []
    finish(made(tmp_path, "a-slow", when=10), written=20, ended=90)
    finish(made(tmp_path, "b-quick", when=30), written=40, ended=50)
    made(tmp_path, "c-unfinished", when=70)
    made(tmp_path, "d-set-aside.old1", when=5)
    (tmp_path / "README").touch()
    assert [run.name for run in all_runs(tmp_path)] == ["d-set-aside.old1", "b-quick", "c-unfinished", "a-slow"]


def test_a_run_is_found_by_name_or_path_and_else_the_names_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run 'x'.*none yet"):
        find_run(tmp_path, "x")
    for name in ("base-x", "base-x.old1", "50% [a] *", "łódź"):
        made(tmp_path, name)
        assert find_run(tmp_path, name).name == name
    for path in (tmp_path / "base-x", Path("base-x")):
        assert find_run(tmp_path / "nowhere", str(path)).name == "base-x"
    with pytest.raises(UsageError, match=r"'base-y'.*mean base-x\?.*50% \[a\] \*, base-x\.old1, łódź"):
        find_run(tmp_path, "base-y")


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 300, "\ud800", "a\nb"], ids=ascii)
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(UserError) as caught:
        find_run(tmp_path / "sub", name)
    assert str(caught.value).isprintable()


def test_an_identity_knows_every_setting_and_no_order():
    one = {"kind": "base", "settings": {"seed": 1, "n_layer": 2}, "base": None}
    assert identity_of(one) == identity_of({"base": None, "settings": {"n_layer": 2, "seed": 1}, "kind": "base"})
    others = [one | {"kind": "full"}, one | {"settings": {"seed": 1, "n_layer": 3}}, one | {"base": {"run": "b"}}]
    assert len({identity_of(each) for each in [one, *others]}) == 4
    assert len(identity_of(one)) == 12


# --- claiming -------------------------------------------------------------------------------------------------------


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_same_identity_comes_back_to_its_folder(tmp_path):
    root = tmp_path / "checkpoints"
    run = claim(root, "base-x", "", about(), fresh=False)
    assert run.folder == root / "base-x" and run.metadata == about() == open_run(run.folder).metadata
    again = claim(root, "base-x", "", about() | {"versions": "later"}, fresh=False)
    assert again.folder == run.folder and again.metadata == about(), "what was written first stays"
    assert names(root) == ["base-x"]


def test_another_identity_gets_a_hash_behind_the_name_and_comes_back_to_it(tmp_path):
    claim(tmp_path, "base-x", "", about(), fresh=False)
    for _ in range(2):
        other = claim(tmp_path, "base-x", "", OTHER, fresh=False)
        assert other.name == "base-x-ba9876" and open_run(other.folder).metadata == OTHER
    assert claim(tmp_path, "base-x", "", about(), fresh=False).name == "base-x"
    assert names(tmp_path) == ["base-x", "base-x-ba9876"]


def test_a_hash_that_is_taken_as_well_is_not_taken_over(tmp_path):
    claim(tmp_path, "base-x", "", about(), fresh=False)
    claim(tmp_path, "base-x", "base-x-ba9876", about(), fresh=False)
    other = claim(tmp_path, "base-x", "", OTHER, fresh=False)
    assert other.metadata == OTHER and other.name == "base-x-ba9876543210"
    assert claim(tmp_path, "base-x", "", OTHER, fresh=False).folder == other.folder


def test_a_chosen_name_is_used_or_refused(tmp_path):
    for _ in range(2):
        assert claim(tmp_path, "base-x", "mine", about(), fresh=False).name == "mine"
    with pytest.raises(UsageError, match="RUN_NAME=mine is taken.*FRESH=True"):
        claim(tmp_path, "base-x", "mine", OTHER, fresh=False)
    assert names(tmp_path) == ["mine"] and open_run(tmp_path / "mine").metadata == about()


def test_fresh_moves_aside_and_never_deletes(tmp_path, capsys):
    for i in range(3):
        run = claim(tmp_path, "base-x", "", about(), fresh=True)
        assert run.name == "base-x" and names(run.folder) == ["run.json"]
        run.save("step", i + 1, {"weights": b"%d" % i}, keep=1)
    assert names(tmp_path) == ["base-x", "base-x.old1", "base-x.old2"]
    for name, step in {"base-x.old1": 1, "base-x.old2": 2, "base-x": 3}.items():
        assert open_run(tmp_path / name).newest("step") == (step, {"weights": b"%d" % (step - 1)})
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "base-x.old1" in told[0] and "base-x.old2" in told[1]


def test_fresh_moves_the_run_of_these_settings_and_not_its_neighbour(tmp_path):
    claim(tmp_path, "base-x", "", about(), fresh=False)
    claim(tmp_path, "base-x", "", OTHER, fresh=False)
    assert claim(tmp_path, "base-x", "", OTHER, fresh=True).name == "base-x-ba9876"
    assert names(tmp_path) == ["base-x", "base-x-ba9876", "base-x-ba9876.old1"]
    assert open_run(tmp_path / "base-x").metadata == about()
    new = claim(tmp_path, "base-x", "", about("cccccccccccc"), fresh=True)
    assert new.name == "base-x-cccccc" and len(names(tmp_path)) == 4


def test_fresh_moves_whatever_has_the_name_that_was_chosen(tmp_path):
    claim(tmp_path, "base-x", "mine", about(), fresh=False)
    assert claim(tmp_path, "base-x", "mine", OTHER, fresh=True).metadata == OTHER
    assert open_run(tmp_path / "mine").metadata == OTHER and open_run(tmp_path / "mine.old1").metadata == about()


def test_a_description_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not (read|write)"):
        claim(tmp_path / "file", "base-x", "", about(), fresh=False)


# --- the lock -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from runtime.storage.lock import RunLock  # and not the run, which would import torch
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A run that another process holds the lock of, and that process."""
    run = made(tmp_path_factory.mktemp("runs"), "50% łódź")
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield run, process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_the_run(held):
    run, process = held
    with pytest.raises(UserError, match=f"run 50% łódź is being trained by process {process.pid}; wait") as caught:
        RunLock(run.folder).__enter__()
    assert caught.value.status == 1


def test_a_run_that_is_being_trained_is_not_moved_aside(held):
    run, process = held
    with pytest.raises(UserError, match=f"process {process.pid}"):
        claim(run.folder.parent, run.name, "", about(), fresh=True)
    assert names(run.folder.parent) == [run.name]


def test_a_holder_that_cannot_be_told_is_another_process(held, monkeypatch):
    run, _ = held
    (run.folder / ".lock-holder").rename(run.folder / "elsewhere")
    with pytest.raises(UserError, match="trained by another process"):
        RunLock(run.folder).__enter__()
    (run.folder / "elsewhere").rename(run.folder / ".lock-holder")


def test_the_lock_goes_with_a_process_that_is_killed(held):
    run, process = held
    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    assert (run.folder / ".lock-holder").exists(), "it had no time to clean up"
    with RunLock(run.folder):
        assert (run.folder / ".lock-holder").read_text() == f"process {os.getpid()}"
    assert not (run.folder / ".lock-holder").exists()


def test_the_lock_can_be_had_again_after_an_error(tmp_path):
    run = made(tmp_path, "base-x")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), RunLock(run.folder):
            _ = 1 / 0
    with RunLock(run.folder):
        pass


def test_whoever_has_the_lock_clears_what_a_killed_process_left(tmp_path):
    run = made(tmp_path, "base-x")
    run.save("step", 1, {"weights": b"w"}, keep=1)
    (run.folder / ".tmp-step-000002-99999").mkdir()
    (run.folder / ".tmp-step-000002-99999" / "weights").write_bytes(b"half")
    (run.folder / ".metrics.jsonl.99999.tmp").touch()
    with RunLock(run.folder):
        assert {path.name for path in run.folder.iterdir()} == {"run.json", "step-000001", ".lock", ".lock-holder"}


def test_a_folder_that_cannot_be_locked_is_one_line_and_stays_unlocked(tmp_path, monkeypatch):
    run = made(tmp_path, "base-x")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = RunLock(run.folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match="base-x.*free some space"):
            failed.__enter__()
    with RunLock(run.folder):
        pass
    with pytest.raises(UserError, match="base-x"):
        RunLock(run.folder / "run.json").__enter__()
    assert json.loads((run.folder / "run.json").read_bytes()) == about()
