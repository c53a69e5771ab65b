"""TRACK: what TensorBoard and W&B hold of a run, also of one that was killed, and that they harm none."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import ROOT, run

from runtime.errors import UserError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.tracking.tracking import Tracking
from runtime.tracking.wandb_log import logs_in
from runtime.training.metrics import read_metrics
from training import begin

LACKING = [name for name in ("tensorboard", "wandb") if not find_spec(name)]
tracked = pytest.mark.skipif(
    bool(LACKING), reason=f"not installed: {', '.join(LACKING)}; pip install -r requirements-tracking.txt"
)
FIGURES = ("loss", "val_loss", "lr", "tokens_per_second", "gradient_norm", "peak_memory")
KEY = "too-short-for-a-key"


def in_tensorboard(folder: Path) -> dict[str, list]:
    """What TensorBoard itself reads in a run's folder: (step, value) by tag, of texts the text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    texts = {tag: read.Tensors(tag) for tag in read.Tags()["tensors"]}
    return found | {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in es] for tag, es in texts.items()}


def in_wandb(folder: Path) -> dict[str, list]:
    """What W&B's own logs hold of a run, one after the other: (step, value) by name."""
    found: dict[str, list] = {}
    for log in logs_in(folder / "wandb"):
        for step, figures in log.steps():
            for name, value in figures.items():
                found.setdefault(name, []).append((step, float(value)))
    return found


def of_metrics(folder: Path, name: str) -> list:
    return [(line["step"], line[name]) for line in read_metrics(folder / "metrics.jsonl") if name in line]


@tracked
def test_a_killed_run_has_each_step_once_in_its_trackers(tmp_path, data_dir):
    words = ("--test-mode", "--max-iters=40", "--save-interval=10", "--eval-interval=20", "--batch-size=4")
    words += ("--n-layer=1", "--n-embd=16", "--track=tensorboard,wandb")
    folder = tmp_path / "checkpoints/test-base-shakespeare"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "training.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as child:
        while not (folder / "step-000010").exists() and child.poll() is None:
            time.sleep(0.002)
        child.kill()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    before = [log.id for log in logs_in(folder / "wandb")]
    again = run(tmp_path, data_dir, "training.py", *words)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("WANDB_API_KEY") == 1 and "warning" not in again.stderr
    board, wandb = in_tensorboard(folder), in_wandb(folder)
    assert len(before) == 1 and {log.id for log in logs_in(folder / "wandb")} == set(before)
    for name in FIGURES:
        expected = of_metrics(folder, name)
        for found in (board[name], wandb[name]):
            steps = [step for step, _ in found]
            assert steps == sorted(set(steps)) and steps[-1] == 40
            if expected:
                assert steps == [step for step, _ in expected]
                assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [step for step, _ in board["settings"]] == [0] and "| seed | 1337 |" in board["settings"][0][1]
    (last,) = board["sample"]
    assert last[0] == 40 and len(last[1]) > 100


@tracked
def test_steps_computed_again_replace_those_after_the_save(tmp_path):
    """As after a kill between a save and the newest step that a tracker was told of."""
    for resumed_at, last, loss in ((0, 9, 1.0), (5, 12, 2.0)):
        tracking = Tracking(["tensorboard"], tmp_path)
        tracking.begin(resumed_at)
        for step in range(resumed_at + 1, last + 1):
            tracking.add(step, loss=loss)
            tracking.send()
        tracking.flush()  # and no end
    assert in_tensorboard(tmp_path)["loss"] == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 13)]


@tracked
def test_a_tracker_that_comes_late_gets_what_was_logged_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "val_loss": 4.0}\n'
    )
    with Tracking(["tensorboard", "wandb"], tmp_path, {"seed": "7"}) as tracking:
        tracking.begin(2)
        tracking.add(3, loss=1.0)
        tracking.send()
    for found in (in_tensorboard(tmp_path), in_wandb(tmp_path)):
        assert (found["loss"], found["val_loss"]) == ([(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 4.0)])


@tracked
def test_a_full_disk_ends_the_tracking_and_nothing_else(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracking(["tensorboard"], tmp_path) as tracking:
        tracking.begin(0)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
            for step in range(1, 200):
                tracking.add(step, loss=1.0)
                tracking.send()
                tracking.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not tracking.active
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard tracks this run no further (File too large); the run goes on")
    assert 10 < len(in_tensorboard(tmp_path)["loss"]) < 199


def test_what_cannot_track_is_said_before_training_begins(tmp_path, data_dir, monkeypatch):
    done = run(tmp_path, data_dir, "training.py", "--test-mode", "--track=mlflow")
    assert done.returncode == 2 and done.stderr == (
        "error: --track mlflow (flag): must be empty, tensorboard, wandb, or both separated by commas\n"
    )
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        settings = Settings(track=name, checkpoints_dir=str(tmp_path / "none"))
        with pytest.raises(UserError, match=f"the package {name}, .*pip install -r .*requirements-tracking.txt"):
            begin(Resolved(settings, {}))
    assert not (tmp_path / "none").exists()


@tracked
def test_a_key_that_is_refused_is_told_nowhere(tmp_path, capsys, monkeypatch):
    """W&B itself says that this is none."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with Tracking(["wandb"], tmp_path) as tracking:
        tracking.begin(0)
        tracking.add(1, loss=1.0)
        tracking.send()
    told = capsys.readouterr().err
    assert told.count("W&B does not accept WANDB_API_KEY (AuthenticationError), so it tracks offline") == 1
    assert in_wandb(tmp_path)["loss"] == [(1, 1.0)] and KEY not in told
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
