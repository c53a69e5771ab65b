"""What TRACK asks of a training run: its figures and texts, step by step, for one tracker or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, Self

from runtime.console import say
from runtime.tracking.tensorboard import TensorBoard
from runtime.tracking.weights_and_biases import WeightsAndBiases
from runtime.training.metrics import read_metrics


class Tracker(Protocol):
    """Keeps the curves of one run, and goes on with them. Its steps come in order; whatever goes wrong is raised.

    newest: the highest step that it has. A step that it is given twice, as it was computed again, counts once.
    """

    label: str
    newest: int

    def __init__(self, folder: Path, settings: Mapping[str, str], resumed_at: int) -> None: ...

    @staticmethod
    def check() -> None:
        """Raises UserError where its package is missing."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text, in Markdown."""

    def flush(self) -> None:
        """Let a kill from now on lose nothing of what it was given, where it can."""

    def close(self, failed: bool) -> None:
        """The run ends here for now."""


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a package is missing."""
    for name in names:
        TRACKERS[name].check()


class Tracking:
    """The trackers of one run, for as long as it is entered.

    One that fails is let go, which is said once; the run and the other trackers go on.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """names: of `TRACKERS`. folder: the run's, which has its metrics.jsonl. settings: as the trackers tell them."""
        self.names, self.folder, self.settings = names, folder, settings
        self.trackers: list[Tracker] = []
        self.step, self.values = 0, {}

    def begin(self, resumed_at: int) -> None:
        """Go on after so many steps. Steps that a tracker lacks it gets from the log of metrics."""
        self.step = resumed_at
        for name in self.names:
            self._guarded(TRACKERS[name].label, lambda name=name: self._begin(TRACKERS[name], resumed_at))

    def _begin(self, kind: type[Tracker], resumed_at: int) -> None:
        tracker = kind(self.folder, self.settings, resumed_at)
        self.trackers.append(tracker)
        if tracker.newest < 1:
            tracker.text(0, "settings", _as_table(self.settings))
        steps: dict[int, dict[str, float]] = {}
        for line in read_metrics(self.folder / "metrics.jsonl") if tracker.newest < resumed_at else ():
            steps.setdefault(line["step"], {}).update(line)
        for step, values in steps.items():
            if tracker.newest < step <= resumed_at:
                tracker.figures(step, {name: value for name, value in values.items() if name != "step"})

    @property
    def active(self) -> bool:
        """Whether a tracker is left."""
        return bool(self.trackers)

    def add(self, step: int, **values: float | None) -> None:
        """Figures of a step, kept until `send`; None is none."""
        self.step = step
        self.values |= {name: value for name, value in values.items() if value is not None}

    def send(self) -> None:
        """Hand on the figures of this step, which are complete."""
        if self.values:
            self._each(lambda tracker: tracker.figures(self.step, self.values))
            self.values = {}

    def text(self, name: str, text: str) -> None:
        """A text in Markdown, such as a sample."""
        self._each(lambda tracker: tracker.text(self.step, name, text))

    def flush(self) -> None:
        """What was handed on is kept whatever happens, as the run is about to be saved."""
        self._each(lambda tracker: tracker.flush())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self._each(lambda tracker: tracker.close(failed=kind is not None))
        self.trackers.clear()

    def _each(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            self._guarded(tracker.label, lambda tracker=tracker: what(tracker))

    def _guarded(self, label: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # of other people's packages, which nothing may depend on
            self.trackers = [tracker for tracker in self.trackers if tracker.label != label]
            # Its own words may have addresses and keys in them.
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            say(f"warning: {label} tracks this run no further ({why}); the run goes on, and metrics.jsonl has it all")


def _as_table(settings: Mapping[str, str]) -> str:
    """Settings as a Markdown table."""
    rows = (f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in settings.items())
    return "\n".join(["| setting | value |", "|---|---|", *rows])
