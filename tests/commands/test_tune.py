"""tune.py: a study that is stopped and gone on with, pruned trials, two processes on one, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import ROOT, run

import tune
from jobs.training import train as training
from jobs.tuning.report import verdict
from jobs.tuning.space import Values, space_of
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import find_run
from tests.tiny import TINY

needs_optuna = pytest.mark.skipif(
    not find_spec("optuna"), reason="not installed: optuna; pip install -r requirements-tune.txt"
)
FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2}
WORDS = ("--test-mode", "--device=cpu", "--dtype=fp32", "--batch-size=4", "--eval-iters=2", "--base=base")
WORDS += ("--dataset=text.txt", "--max-iters=40", "--eval-interval=10", "--save-interval=10")
WORDS += ("--lora-variant=lora", "--lora-alpha=16", "--lora-dropout=0", "--ranks=2,4", "--targets=all")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a text, and a base that was trained on it."""
    root = tmp_path_factory.mktemp("tune")
    (root / "text.txt").write_text("Who has them? It is Anna who has so many owls, and 12 cats.\n" * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        asked = FAST | TINY | {"dataset": "text.txt", "run_name": "base", "max_iters": 20, "architecture": "gpt"}
        training.train(Resolved(Settings.from_dict(asked), {}))
    return root


def trials(root: Path, study: str) -> list[tuple]:
    """(state, params, loss, curve) of each trial, as Optuna itself reads them."""
    import optuna

    found = optuna.load_study(study_name=study, storage=f"sqlite:///{root}/checkpoints/{study}/study.db").trials
    return [(trial.state.name, trial.params, trial.value, trial.intermediate_values) for trial in found]


@needs_optuna
def test_a_killed_study_goes_on_as_two_processes(root, data_dir):
    words = ("--study=killed", "--trials=3", "--learning-rates=1e-3..1e-2", "--seeds=1", *WORDS)
    first = root / "checkpoints/tune-killed-000"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tune.py"), *words],
        cwd=root,
        env=os.environ | {"DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as child:
        while not (first / "step-000010").exists() and child.poll() is None:
            time.sleep(0.002)
        child.kill()
    assert child.returncode == -signal.SIGKILL, "the study ended before it could be killed"
    ((state, params, _, _),) = trials(root, "tune-killed")
    assert state == "RUNNING"
    again = run(root, data_dir, "tune.py", *words, "--jobs=2")
    assert again.returncode == 0, again.stderr
    assert "Going on with tune-killed-000 after step" in again.stderr
    found = trials(root, "tune-killed")
    assert len(found) == 3 and found[0][:2] == ("COMPLETE", params)
    for number, (state, _, loss, curve) in enumerate(found):
        trial = find_run(root / "checkpoints", f"tune-killed-{number:03d}")
        assert trial.finished == (state == "COMPLETE")
        if trial.finished:
            assert loss == trial.result["best"] and list(curve) == [10, 20, 30]
        else:
            assert trial.saved("step")[-1][0] == max(curve)
            assert f"{trial.name} is stopped after step {max(curve)}, which is saved: its loss is" in again.stderr
    best = min((trial for trial in found if trial[0] == "COMPLETE"), key=lambda trial: trial[2])
    final = json.loads((root / "checkpoints/tune-killed/final.json").read_bytes())
    assert final["best"] == best[1] and {len(losses) for losses in final["losses"].values()} == {1}
    assert f"--lora-rank {best[1]['lora_rank']} " in again.stdout and "with 1 new seeds each" in again.stdout


@needs_optuna
def test_ctrl_c_says_how_to_go_on_and_other_settings_and_a_corrupted_study_are_refused(root, monkeypatch, capsys):
    def tuned(*words: str) -> tuple[int, str]:
        asked = ["--study=stopped", "--trials=1", "--seeds=0", "--learning-rates=1e-2,5", *WORDS, *words]
        monkeypatch.setattr(sys, "argv", ["tune.py", *asked])
        with pytest.raises(SystemExit) as ending:
            run_command(tune.main)
        return ending.value.code, capsys.readouterr().err

    monkeypatch.chdir(root)
    folder = root / "checkpoints/tune-stopped-000"

    def interrupt() -> None:
        while not (folder / "step-000010").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    status, said = tuned()
    assert status == 130 and "0 of 1 trials are finished; to go on: " in said
    status, said = tuned("--max-iters=30")
    assert status == 2 and said.endswith(
        "error: the study stopped was made with MAX_ITERS=40 (not 30): give the same, or another --study\n"
    )
    status, said = tuned()
    assert status == 0 and "Going on with tune-stopped-000 after step" in said
    status, said = tuned("--trials=3")
    assert status == 0 and "step 40/40" not in said.partition("Trial 3 of 3")[0], "a finished trial was redone"
    pruned = [params for state, params, *_ in trials(root, "tune-stopped") if state == "PRUNED"]
    assert [params["learning_rate"] for params in pruned] == [5.0], "a bad rate is stopped early"
    assert "is stopped after step 10, which is saved: its loss is above the median" in said
    file = root / "checkpoints/tune-stopped/study.db"
    file.write_bytes(b"rot" * 1000)
    status, said = tuned()
    assert status == 1 and said.endswith(
        "study.db cannot be used (file is not a database); move it away to begin the study anew\n"
    )


def test_a_space_is_of_lists_and_ranges_without_what_is_given():
    flags = {"ranks": "4,8", "alphas": "", "dropouts": "0..0.5", "learning_rates": "", "targets": "all", "variants": ""}
    space = space_of(flags, {}, {"lora_rank"}, 4e-3)
    assert [str(values) for values in space] == ["0..0.5", "0.0005..0.016", "all"]
    assert [values.by_factors for values in space] == [False, True, False]
    assert Values.parse("ranks", "4, 8,4").values == (4, 8)
    for flag, text, told in (
        ("ranks", "0,8", "--ranks 0,8: each must be a whole number from 1 to 4096"),
        ("learning_rates", "1e-2..1e-3", "--learning-rates 1e-2..1e-3: a range is of numbers"),
        ("targets", "all..minimal", "a range is of numbers"),
        ("variants", "lora,x", "each must be one of lora, rslora"),
    ):
        with pytest.raises(UsageError, match=re.escape(told)):
            Values.parse(flag, text)
    with pytest.raises(UsageError, match="--ranks searches LORA_RANK, which is given too"):
        space_of(flags, {"ranks": "4"}, {"lora_rank"}, 4e-3)
    one = dict.fromkeys(flags, "") | {"ranks": "8"}
    with pytest.raises(UsageError, match="nothing is left to search"):
        space_of(one, {}, {"learning_rate"}, 4e-3)


@pytest.mark.parametrize(
    ("best", "said"),
    [([1.0, 1.1], "beat the defaults by 0.5000"), ([1.6, 1.5], "No winner"), ([2.6, 2.5], "defaults are better by")],
)
def test_a_winner_is_one_by_more_than_seeds_differ(best, said):
    assert said in verdict({"lora_rank": 8}, {"best": best, "default": [1.5, 1.6]})


def test_what_a_study_cannot_do_is_said_before_a_base_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    for word, status, told in (
        ("--use-lora", 2, "error: tune.py does not take --use-lora: "),
        ("--trials=3", 1, f"pip install -r {ROOT}/requirements-tune.txt\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["tune.py", word])
        with pytest.raises(SystemExit) as ending:
            run_command(tune.main)
        assert ending.value.code == status and told in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
