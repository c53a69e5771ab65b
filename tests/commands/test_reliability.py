"""Real runs on disks that fill, beside readers, and with numbers that are not finite."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import NO_TRACEBACK, ROOT, run

from runtime.errors import UserError
from runtime.storage import folders
from runtime.storage.runs import Run, all_runs, open_run

NAME = "test-base-shakespeare"
SAVES = ("--test-mode", "--n-layer=1", "--save-interval=5", "--eval-interval=5", "--eval-iters=1", "--batch-size=4")


def start(folder: Path, data_dir: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "training.py"), *SAVES, *flags],
        cwd=folder,
        env=os.environ | {"DATA_DIR": str(data_dir), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def good_steps(folder: Path) -> list[int]:
    """The resumable steps there; each is whole, and nothing temporary lies beside them."""
    run = open_run(folder / "checkpoints" / NAME)
    assert not list(run.folder.glob(".tmp*"))
    assert all(folders.read_folder(path) for prefix in ("step", "best") for _, path in run.saved(prefix))
    return [step for step, _ in run.saved("step")]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
def test_a_disk_that_fills_during_a_run_keeps_the_last_good_step(tmp_path, data_dir):
    import resource  # not on Windows

    saved = tmp_path / "checkpoints" / NAME / "step-000005"
    with start(tmp_path, data_dir, "--max-iters=2000") as child:
        while not saved.exists() and child.poll() is None:
            time.sleep(0.005)
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        told = child.communicate()[1]
    error = told.splitlines()[-1]
    assert child.returncode == 1 and NO_TRACEBACK not in told, told
    assert error.startswith("error: could not save") and "MB are needed there; free some space" in error
    assert not list((tmp_path / "checkpoints" / NAME).glob(".tmp*"))
    assert (before := good_steps(tmp_path)) and before[-1] % 5 == 0
    with start(tmp_path, data_dir, "--max-iters=2000") as child:
        while newest_step(tmp_path) <= before[-1] and child.poll() is None:
            time.sleep(0.005)
        child.terminate()
        assert f"after step {before[-1]} of 2000" in child.communicate()[1]


def newest_step(folder: Path) -> int:
    """How far the run has come."""
    return max((step for step, _ in Run(folder / "checkpoints" / NAME, {}).saved("step")), default=0)


SMALL = """
mount -t tmpfs -o size=6m small "$1" && cd "$1" || exit 77
(until [ -e checkpoints/*/step-000020 ]; do sleep 0.01; done
cat /dev/zero >other 2>/dev/null; truncate -s -40k other) &
"$2" "$3"; echo "<$?>"; ls -A checkpoints/*; df --output=avail . | tail -1
mount -o remount,size=64m small "$1" && "$2" "$3"; echo "<$?>"; ls -A checkpoints/*
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="a small file system needs namespaces")
def test_a_small_file_system_that_is_full_keeps_the_last_good_step(tmp_path, data_dir):
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", SMALL, "sh", str(tmp_path), sys.executable, str(ROOT / "training.py")],
        env=os.environ | {"DATA_DIR": str(data_dir), "PYTHONIOENCODING": "utf-8", "TEST_MODE": "1", "MAX_ITERS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if done.returncode == 77 or "<" not in done.stdout:
        pytest.skip(f"no small file system can be made here: {done.stdout.strip()}")
    first, second, third = done.stdout.replace("<1>", "<0>").split("<0>")
    assert "No space left on device" in first and "MB are needed there; free some space" in first, first
    assert NO_TRACEBACK not in done.stdout
    listed = second.partition("Going on")[0]
    newest = max(int(step) for step in re.findall(r"step-(\d+)", listed))
    assert newest < 120 and ".tmp" not in listed
    assert f"Going on with test-base-shakespeare after step {newest} " in second and "model" in third


def test_readers_find_whole_files_whenever_they_look(tmp_path, data_dir):
    looked = 0
    with start(tmp_path, data_dir, "--max-iters=150", "--keep-checkpoints=1") as child:
        while child.poll() is None:
            for there in all_runs(tmp_path / "checkpoints"):
                try:
                    files = there.read()
                except UserError as error:
                    assert "has not saved anything yet" in str(error) and not looked
                else:
                    looked += 1
                    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert child.returncode == 0, child.stderr.read()
    assert looked > 20


def test_numbers_that_are_not_finite_end_the_run_and_leave_their_batch(tmp_path, data_dir):
    flags = ("--test-mode", "--learning-rate=1e30", "--warmup-iters=0", "--grad-clip=0", "--save-interval=1")
    done = run(tmp_path, data_dir, "training.py", *flags)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "not finite at step 1," in error and "nonfinite-batch.json" in error
    assert good_steps(tmp_path) == [1]
    about = json.loads((tmp_path / "checkpoints" / NAME / "nonfinite-batch.json").read_bytes())
    assert about["step"] == 1 and len(about["text"]) == len(about["tokens"]) == 16
    assert all(len(text) == len(tokens) == 64 for text, tokens in zip(about["text"], about["tokens"], strict=True))
