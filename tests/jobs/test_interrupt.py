"""A signal ends a run after the step it is in, with that step saved; the next start goes on there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.runs import loop
from jobs.training import train as training
from runtime.interrupt import InterruptedRunError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import Run
from tests.tiny import TINY as TINY_BASE

ROOT = Path(__file__).resolve().parents[2]
TINY = TINY_BASE | {"dropout": 0.1, "device": "cpu", "dtype": "fp32"}
FAST = {"test_mode": True, "batch_size": 4, "eval_iters": 2, "max_iters": 8, "eval_interval": 4, "save_interval": 100}


def train(root: Path, **changes) -> Run:
    (root / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    values = (
        TINY | FAST | {"checkpoints_dir": str(root / "runs"), "dataset": str(root / "text.txt"), "run_name": "base"}
    )
    return training.train(Resolved(Settings.from_dict(values | changes), {}))


def signalled(monkeypatch: pytest.MonkeyPatch, at: int, *numbers: int) -> None:
    """Have these signals come in the middle of a step."""
    step = loop.Stepper.step

    def with_signal(self, number: int) -> None:
        if number == at:
            for signal_ in numbers:
                os.kill(os.getpid(), signal_)
        step(self, number)

    monkeypatch.setattr(loop.Stepper, "step", with_signal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_a_signal_ends_a_run_with_its_step_saved(tmp_path: Path, number: int, status: int, at: int) -> None:
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRunError) as error:
        signalled(patch, at, number)
        train(tmp_path)
    assert error.value.status == status
    assert str(error.value) == f"stopped after step {at + 1}, which is saved; the same command goes on there"
    assert signal.getsignal(number) is before
    assert (tmp_path / f"runs/base/step-{at + 1:06d}").is_dir()
    assert train(tmp_path).finished


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch) -> None:
    signalled(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, save_interval=2)
    assert [path.name for path in sorted((tmp_path / "runs/base").glob("step-*"))] == ["step-000002", "step-000004"]


def started(folder: Path, *flags: str, wait_for: str = "step-*", **options) -> subprocess.Popen:
    """A run that has a million steps to take, once it has come to its first save."""
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    command = [sys.executable, str(ROOT / "training.py"), "--dataset", "text.txt", "--test-mode", "--run-name", "base"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen([*command, "--max-iters", "1000000", *flags], cwd=folder, text=True, **streams)
    while not list((folder / "checkpoints").glob(f"base/{wait_for}")) and process.poll() is None:
        time.sleep(0.01)
    return process


def test_sighup_stays_ignored_where_it_was(tmp_path: Path) -> None:
    process = started(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 143


def test_a_reader_of_stderr_that_goes_away_costs_no_step(tmp_path: Path) -> None:
    seldom = ("--save-interval", "100000", "--eval-interval", "100000", "--log-interval", "20")
    process = started(tmp_path, *seldom, wait_for="run.json")
    assert any(": step 20/" in line for line in process.stderr)
    process.stderr.close()  # the next line about the progress has nobody to go to
    assert process.wait(timeout=60) == 141
    (saved,) = (tmp_path / "checkpoints").glob("base/step-*")
    assert int(saved.name.removeprefix("step-")) > 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_run_without_streams_trains(tmp_path: Path, closed: str) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    command = (
        f"'{sys.executable}' '{ROOT / 'training.py'}' --test-mode --max-iters 5 --dataset text.txt --run-name base"
    )
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "checkpoints/base/model").is_dir()
    assert bool(done.stdout) == (">&-" not in closed.split())
    again = subprocess.run(["sh", "-c", f"{command} --seed x {closed}"], cwd=tmp_path, capture_output=True, check=False)
    assert again.returncode == 2, "and one with a wrong setting still tells by its status"


def test_ctrl_c_while_the_packages_are_imported_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('tiktoken', 'rustbpe') else find(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "training.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = "error: not installed for this Python: tiktoken, rustbpe; try: "
    assert done.returncode == 1 and done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert "-m pip install -r " in done.stderr


def test_a_process_that_is_told_to_end_says_how_to_go_on(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 143, told
    assert "which is saved; the same command goes on there" in told.splitlines()[-1]
    assert "Traceback" not in told
