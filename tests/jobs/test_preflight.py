"""What a run will need later is checked before its first step."""

from __future__ import annotations

import sys
import textwrap

import pytest

from jobs.training import train as training
from runtime import extras
from runtime.errors import UsageError, UserError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.lock import RunLock
from tests.commands.command_line import run

TINY = ("--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--max-iters", "3", "--dtype", "fp32")


@pytest.fixture
def folder(tmp_path):
    lines = [f"line {i} of a text that says something new each time\n" for i in range(100)]
    (tmp_path / "new.txt").write_text("".join(lines))
    (tmp_path / "same.txt").write_text("All work and no play\n" * 100)
    (tmp_path / "one.txt").write_text("ab " * 500)
    (tmp_path / "wrapped.txt").write_text(textwrap.fill("All work and no play makes Jack a dull boy. " * 100, 50))
    return tmp_path


def test_no_room_for_the_saves_is_told_before_the_first_step(folder, data_dir):
    saves = ("--max-iters", "1000000000", "--save-interval", "1", "--keep-checkpoints", "1000000")
    done = run(folder, data_dir, "training.py", "--dataset", "new.txt", *TINY[:8], "--n-embd", "4096", *saves)
    assert done.returncode == 1 and "Total parameters" not in done.stdout
    told = done.stderr.splitlines()[-1]
    assert (
        told.startswith("error: checkpoints/base-new: the run will save up to ")
        and "lower KEEP_CHECKPOINTS=1000000" in told
    )
    assert not list((folder / "checkpoints").glob("*/step-*"))


def test_a_run_that_is_being_trained_is_refused_by_its_lock_before_its_files_are_counted(folder, data_dir):
    saves = ("--max-iters", "1000000000", "--save-interval", "1", "--keep-checkpoints", "1000000")
    size = ("--n-layer", "1", "--n-head", "1", "--n-embd", "4096", "--block-size", "8")
    busy = folder / "checkpoints" / "busy"
    busy.mkdir(parents=True)
    with RunLock(busy):
        done = run(folder, data_dir, "training.py", "--dataset", "new.txt", *size, *saves, "--run-name", "busy")
    assert done.returncode == 1 and "error: run busy is being trained by process " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "warned"), [("new.txt", False), ("same.txt", True), ("one.txt", True), ("wrapped.txt", True)]
)
def test_a_held_out_text_that_was_trained_on_is_warned_of(folder, data_dir, text, warned):
    done = run(folder, data_dir, "training.py", "--dataset", text, *TINY)
    assert done.returncode == 0, done.stderr
    assert ("of what is held out of " in done.stderr) == (text != "new.txt")


def test_a_runs_folder_that_cannot_be_written_is_one_line(folder, data_dir):
    (folder / "checkpoints").write_text("a file")
    done = run(folder, data_dir, "training.py", "--dataset", "new.txt", *TINY)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "checkpoints" in done.stderr


def test_a_picture_that_was_asked_for_needs_its_library_first(folder, data_dir):
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
    )
    done = run(folder, data_dir, "adapters.py", "strength", "nobody", "--out", "x.png", PYTHONPATH=str(folder))
    assert done.returncode == 2 and "--out x.png: pictures need matplotlib; get it with: " in done.stderr


def test_results_of_a_comparison_that_could_not_be_written_are_told_before_its_steps(folder, data_dir):
    flags = ("--dataset", "new.txt", *TINY, "--run-name", "base")
    assert run(folder, data_dir, "training.py", *flags).returncode == 0
    (folder / "file").write_text("a file")
    base = ("--base", "checkpoints/base", "--checkpoints-dir", "file")
    done = run(folder, data_dir, "compare.py", "--dataset", "new.txt", "--max-iters", "3", *base)
    told = done.stderr.splitlines()
    assert done.returncode == 1 and told[-1].startswith("error: could not write file") and "step" not in done.stderr


@pytest.mark.parametrize(
    ("optimizer", "missing", "error", "told"),
    [
        ("paged_adamw", (), UsageError, "OPTIMIZER=paged_adamw works on cuda only"),
        ("adamw8bit", ("bitsandbytes", "bitsandbytes.functional"), UserError, "needs the package bitsandbytes, which"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_told_before_anything_is_loaded(
    folder, monkeypatch, optimizer, missing, error, told
):
    extras.bitsandbytes.cache_clear()
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    runs = folder / "checkpoints"
    asked = {"optimizer": optimizer, "device": "cpu", "dataset": "nowhere.txt", "checkpoints_dir": str(runs)}
    with pytest.raises(error, match=told) as caught:
        training.train(Resolved(Settings.from_dict(asked | {"use_lora": True}), {}))
    assert str(caught.value).isprintable() and not runs.exists()
    assert not missing or str(caught.value).endswith("requirements-memory.txt")
