"""A study on disk: which trials there are, and who has which in hand. Several processes may share one.

Optuna (Akiba et al. 2019, arXiv 1907.10902) keeps it in an SQLite file. A trial that a process has in hand is locked by
a file, and the system drops a lock with its process: a trial that is neither finished nor locked was left by one that
was stopped, and is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from jobs.tuning.space import Values
from runtime.errors import UsageError, UserError
from runtime.extras import needs_package
from runtime.storage import folders

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

FILE, MADE_WITH = "study.db", "made_with"
BUSY = 60  # seconds that one process waits for another that writes to the file
STARTUP, TEST_STARTUP = 4, 1  # trials that end before any is pruned


def check_optuna() -> None:
    """Raises UserError where Optuna is missing."""
    with needs_package("optuna", "tune"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class SharedStudy:
    """A study in a folder of its own.

    Raises UserError where it is corrupted, UsageError where it was made with other settings.
    """

    def __init__(self, folder: Path, space: Sequence[Values], settings: dict[str, Any]) -> None:
        import optuna

        self.folder, self.space, self.file = folder, space, folder / FILE
        with folders.plain_errors(folder, "write"):
            folder.mkdir(parents=True, exist_ok=True)
        startup = TEST_STARTUP if settings["test_mode"] else STARTUP
        # Seeded anew for each trial, so that no other process, and none that goes on, proposes the same again.
        self.sampler = lambda number: optuna.samplers.TPESampler(
            seed=settings["seed"] + number, n_startup_trials=2 * startup
        )
        with self._readable(), self._alone():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.file.resolve()}", engine_kwargs={"connect_args": {"timeout": BUSY}}
            )
            self.study = optuna.create_study(
                storage=storage,
                study_name=folder.name,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=startup),
                load_if_exists=True,
            )
            self._check_same(settings | {values.name: str(values) for values in space})

    def _check_same(self, settings: dict[str, Any]) -> None:
        made_with = self.study.user_attrs.get(MADE_WITH)
        if made_with is None:
            self.study.set_user_attr(MADE_WITH, json.loads(json.dumps(settings)))
            return
        names = sorted(name for name in made_with.keys() | settings if made_with.get(name) != settings.get(name))
        if names:
            told = ", ".join(f"{n.upper()}={made_with.get(n, 'default')} (not {settings.get(n)})" for n in names)
            study = self.folder.name.removeprefix("tune-")
            raise UsageError(f"the study {study} was made with {told}: give the same, or another --study")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process looks which trial comes next meanwhile."""
        with filelock.FileLock(self.folder / ".lock"):
            yield

    @contextmanager
    def _readable(self) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, KeyError, ValueError, AssertionError) as error:
            if isinstance(error, UserError):
                raise
            why = str(getattr(error, "orig", "")) or type(error).__name__
            raise UserError(
                f"the study in {self.file} cannot be used ({why}); move it away to begin the study anew"
            ) from None

    def trials(self) -> list[FrozenTrial]:
        """All trials, as they stand."""
        with self._readable():
            return self.study.get_trials(deepcopy=False)

    @contextmanager
    def next_trial(self, count: int) -> Iterator[Trial | None]:
        """A trial for this process alone: one that was left, else a new one, as long as there are fewer than `count`;
        None where nothing is left to do."""
        import optuna

        trial = lock = None
        with self._readable(), self._alone():
            trials = self.study.get_trials(deepcopy=False)
            for left in (each for each in trials if not each.state.is_finished()):
                lock = self._lock(left.number)
                if lock.acquire_or_not():
                    trial = optuna.trial.Trial(self.study, left._trial_id)
                    break
            if trial is None and len(trials) < count:
                trial = self.study.ask()
                lock = self._lock(trial.number)
                lock.acquire_or_not()
        if trial is None:
            yield None
            return
        self.study.sampler = self.sampler(trial.number)
        try:
            yield trial
        finally:
            lock.release()

    def _lock(self, number: int) -> _Lock:
        return _Lock(self.folder / f".trial-{number:03d}.lock", timeout=0)

    def params(self, trial: Trial) -> dict[str, Any]:
        """The settings that a trial tries, by name."""
        with self._readable():
            return {values.name: values.suggest(trial) for values in self.space}

    def report(self, trial: Trial, step: int, loss: float) -> bool:
        """Note a point of a trial's curve; whether it is above the median of the others there, and to be stopped."""
        with self._readable():
            if step not in self.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                trial.report(loss, step)
            return trial.should_prune()

    def tell(self, trial: Trial, loss: float | None, pruned: bool = False) -> None:
        """A trial has ended: with a loss, or None where it was stopped or failed."""
        from optuna.trial import TrialState

        state = TrialState.PRUNED if pruned else TrialState.COMPLETE if loss is not None else TrialState.FAIL
        with self._readable():
            self.study.tell(trial, loss, state=state)


class _Lock(filelock.FileLock):
    def acquire_or_not(self) -> bool:
        try:
            self.acquire()
        except filelock.Timeout:
            return False
        return True
