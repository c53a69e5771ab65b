"""A signal ends a run after the step it is in, with that step saved; the next start goes on there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import training
from runtime.checkpoint import Run
from runtime.config import Settings
from runtime.interrupt import InterruptedRunError
from runtime.sources import Resolved

ROOT = Path(__file__).resolve().parents[2]
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0.1, "device": "cpu", "dtype": "fp32"}
FAST = {"test_mode": True, "batch_size": 4, "eval_iters": 2, "max_iters": 8, "eval_interval": 4, "save_interval": 100}


def train(root: Path, **changes) -> Run:
    (root / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    values = (
        TINY | FAST | {"checkpoints_dir": str(root / "runs"), "dataset": str(root / "text.txt"), "run_name": "base"}
    )
    return training.train(Resolved(Settings.from_dict(values | changes), {}))


def signalled(monkeypatch: pytest.MonkeyPatch, at: int, *numbers: int) -> None:
    """Have these signals come in the middle of a step."""
    step = training.Stepper.step

    def with_signal(self, number: int) -> None:
        if number == at:
            for signal_ in numbers:
                os.kill(os.getpid(), signal_)
        step(self, number)

    monkeypatch.setattr(training.Stepper, "step", with_signal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_a_process_that_is_told_to_end_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    command = [sys.executable, str(ROOT / "training.py"), "--dataset", "text.txt", "--test-mode", "--run-name", "base"]
    process = subprocess.Popen(
        [*command, "--max-iters", "1000000"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "checkpoints").glob("base/step-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 143, told
    assert "which is saved; the same command goes on there" in told.splitlines()[-1]
    assert "Traceback" not in told
