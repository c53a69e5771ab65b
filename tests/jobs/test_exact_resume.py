"""A run that was stopped and started again is the run that never was: the same files, bit for bit, and the same log.

The trainer itself is stopped at its own moments: each part of a step, each batch of an evaluation, each line of the
log, before and after each save. SOAK=1 stops at every one of them; otherwise each case takes its share.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import jobs.runs.job
import jobs.summaries.text
from jobs.runs import loop
from jobs.runs.job import Job
from jobs.training import train as training
from lora.variants.registry import VARIANTS
from runtime.interrupt import InterruptedRunError
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.folders import read_folder
from runtime.storage.runs import Run
from runtime.training.metrics import MetricsLog
from runtime.training.resume import STATE, State, to_files
from runtime.training.steps import Stepper
from tests.tiny import TINY as TINY_BASE

SOAK = bool(os.environ.get("SOAK"))
SHARE = 2  # of a case's moments, in a quick run
CLOCKED = ("seconds", "tokens_per_second", "peak_memory")  # what may differ
TINY = TINY_BASE | {"n_embd": 8, "bias": True}
FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 2, "gradient_accumulation_steps": 2}
FAST |= {"dropout": 0.2, "eval_iters": 2}
# Evaluations after steps 2, 4, 6, 8 and 9, saves after 3, 6 and 9. A run that only gets worse is saved after step 6
# with two evaluations without improvement, and patience ends it after step 8.
PACE = {"max_iters": 9, "eval_interval": 2, "save_interval": 3, "patience": 3, "learning_rate": 0.025}
FAMILIAR, STRANGE = "the quick brown fox\n" * 45, "JUMPS OVER LAZY DOGS\n" * 5
TEXTS = {"better": FAMILIAR, "worse": FAMILIAR + STRANGE}  # by how the loss on the last tenth goes
STALE = {"better": 0, "worse": 3}  # evaluations without improvement at the end
LORA = {"base": "base", "use_lora": True, "lora_rank": 2, "lora_alpha": 2.0, "lora_dropout": 0.2, "lora_bias": "all"}
KINDS = {
    "base of characters": TINY,
    "base of word pieces, bf16": TINY | {"tokenizer": "bpe", "vocab_size": 270, "dtype": "bf16"},
    "base with moments in 8 bits": TINY | {"n_embd": 64, "optimizer": "adamw8bit", "learning_rate": 0.01},
    "full fine-tuning": {"base": "base"},
    **{variant: LORA | {"lora_variant": variant} for variant in VARIANTS},
    "on a base in 4 bits": LORA | {"quantize": "nf4"},
}
CASES = [(kind, text) for kind in KINDS for text in TEXTS]


class Moments:
    """The moments of a run, counted; `strike` is called at moment `k` (from 1; 0 is never)."""

    def __init__(self, k: int = 0, strike: Callable[[], object] = lambda: None) -> None:
        self.k, self.strike, self.count = k, strike, 0

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count == self.k:
            self.strike()

    def around(self, method: Callable) -> Callable:
        """The method, with a moment before and a moment after each call."""

        def called(*args, **kwargs):
            self()
            result = method(*args, **kwargs)
            self()
            return result

        return called

    def before_each(self, items: list) -> Iterator:
        """The items, with a moment before each."""
        for item in items:
            self()
            yield item

    @contextmanager
    def of_a_run(self) -> Iterator[None]:
        """While this is entered, runs have moments."""
        honest = jobs.runs.job.evaluate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "lap", staticmethod(self))  # after each forward and backward, and each update
            patch.setattr(
                jobs.runs.job, "evaluate", lambda m, batches, where: honest(m, self.before_each(batches), where)
            )
            for owner, name in ((MetricsLog, "add"), (MetricsLog, "flush"), (Run, "save"), (Run, "publish")):
                patch.setattr(owner, name, self.around(getattr(owner, name)))
            patch.setattr(Job, "load_artifact", self.around(Job.load_artifact))
            yield


class Case:
    """One kind of run on one text, and what it leaves when nothing stops it."""

    def __init__(self, root: Path, about: tuple[str, str]) -> None:
        self.metadata, self.folder, self.last = about, root / "runs/case", {}
        kind, text = about
        values = FAST | PACE | KINDS[kind] | {"run_name": "case", "dataset": str(root / f"{text}.txt")}
        self.values = values | places(root)
        whole = Moments()
        self.start(whole)
        self.whole, self.moments = self.left(), whole.count
        shutil.rmtree(self.folder)

    def start(self, moments: Moments) -> None:
        """Start the run, or go on with it. Raises what its strike raises."""
        all_steps = loop.Training.all_steps

        def noted(this: loop.Training) -> State:
            state = all_steps(this)
            self.last = to_files(this.stepper, state)
            return state

        torch.manual_seed(12345 + moments.k)  # whatever was drawn before must not matter
        with moments.of_a_run(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Training, "all_steps", noted)
            patch.setattr(jobs.summaries.text, "TEST_SAMPLE_CHARACTERS", 2)
            train(self.values)

    def left(self) -> dict:
        """Everything that must be the same whether or not the run was stopped."""
        about = json.loads((self.folder / "run.json").read_bytes())
        run, log = Run(self.folder, about), (self.folder / "metrics.jsonl").read_text()
        return {
            "weights and optimizer": {name: data for name, data in self.last.items() if name != STATE},
            "state": unclocked(json.loads(self.last[STATE])),
            "log": [unclocked(json.loads(line)) for line in log.splitlines()],
            "product": read_folder(run.artifact),
            "result": unclocked(run.result),
            "run.json": about,
            "files": sorted(path.name for path in self.folder.iterdir()),
        }

    def difference(self) -> str:
        """What is not as the whole run left it; empty where all is. The run is then gone."""
        now, self.last = self.left(), {}
        shutil.rmtree(self.folder)
        return ", ".join(key for key in self.whole if now[key] != self.whole[key])


def unclocked(values: dict) -> dict:
    """Without what may differ: the clock and the memory."""
    return {name: value for name, value in values.items() if name not in CLOCKED}


def places(root: Path) -> dict:
    return {"checkpoints_dir": str(root / "runs"), "data_dir": str(root / "cache")}


def train(values: dict) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        training.train(Resolved(Settings.from_dict(values), {}))


def leave() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the texts, and a base that knows the characters of both."""
    root = tmp_path_factory.mktemp("resume")
    for name, text in {**TEXTS, "both": STRANGE + FAMILIAR}.items():
        (root / f"{name}.txt").write_text(text)
    train(
        FAST
        | TINY
        | {
            "max_iters": 100,
            "optimizer": "adamw",
            "lr_decay": "cosine",
            "run_name": "base",
            "dataset": str(root / "both.txt"),
        }
        | places(root)
    )
    return root


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(root: Path, request) -> Case:
    """Each case in turn, with nothing of it on the disk."""
    return Case(root, request.param)


def points(case: Case) -> list[int]:
    """The moments to stop at: every one, or every few of them, each case beginning elsewhere."""
    every = 1 if SOAK else case.moments // SHARE
    return list(range(1 + CASES.index(case.metadata) * 3 % every, case.moments + 1, every))


def told(case: Case, counted: int, struck: int, bad: dict) -> None:
    print(
        f"{' '.join(case.metadata)}: {case.moments} moments, {counted} points counted, {struck} struck, {len(bad)} bad"
    )
    assert not bad
    assert counted == struck > 0


def test_it_ends_by_patience_where_the_loss_rises_and_only_there(case: Case) -> None:
    losses = {line["step"]: line["val_loss"] for line in case.whole["log"] if "val_loss" in line}
    best, stale = min(losses, key=losses.get), STALE[case.metadata[1]]
    assert stale == len([step for step in losses if step > best])
    state = {"best_step": best, "step": max(losses), "stale": stale, "best": losses[best], "scaler": {}}
    assert case.whole["state"] == state, losses


def test_a_run_that_was_stopped_at_any_moment_is_the_run_that_was_not(case: Case) -> None:
    struck, bad = 0, {}
    for k in points(case):
        try:
            case.start(Moments(k, leave))
        except KeyboardInterrupt:
            struck += 1
        case.start(Moments())
        if difference := case.difference():
            bad[k] = difference
    told(case, len(points(case)), struck, bad)


def test_a_run_that_is_asked_to_stop_in_every_step_is_the_run_that_was_not(case: Case) -> None:
    steps, struck = case.whole["state"]["step"], 0
    for _ in range(steps):
        try:
            case.start(Moments(1, lambda: signal.raise_signal(signal.SIGINT)))
        except InterruptedRunError:
            struck += 1
    case.start(Moments())
    told(case, steps, struck, {"all": difference} if (difference := case.difference()) else {})
