"""What the files of a run say of it. Nothing is computed on a model here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.judging.rendering import scorecard_rows
from jobs.runs.base import name_of_base
from runtime.errors import UserError
from runtime.settings.config import EARLIER, Settings
from runtime.storage import folders
from runtime.storage.encoding import read_json
from runtime.storage.lock import RunLock
from runtime.storage.runs import Run, find_run
from runtime.training.metrics import read_metrics

Points = list[tuple[float, float]]
SCORECARD = "report.json"  # of evaluate.py --out


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Raises CorruptedError, naming the file, where what is done here finds it is not what it should be."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise folders.CorruptedError(f"{path} is corrupted: it has no such thing as {error}") from None


@dataclass(frozen=True)
class Facts:
    """A run by its files. scorecards: what evaluate.py left of it, by the folder."""

    run: Run
    result: Mapping[str, Any]
    metrics: list[dict]
    state: str  # finished, training, stopped or made
    scorecards: Mapping[str, dict] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, with what an earlier version did where it had none for it."""
        return settings_of_run(self.run)

    @property
    def base(self) -> str:
        """The base as BASE takes it; empty where there is none."""
        said = self.run.metadata["base"]
        return self.settings.get("base") or name_of_base(said) if said else ""

    @property
    def read(self) -> dict[str, Any]:
        """The settings that decided what the run computed, with its base by name."""
        try:
            found = Settings.from_dict(self.settings).identity()
        except UserError:  # of a version that knew others, or of a run that was made
            found = self.settings
        return found | ({"base": self.run.metadata["base"]["run"]} if self.run.metadata["base"] else {})

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([line["step"] for line in self.metrics], default=0)

    def curve(self, name: str) -> Points:
        """A column of metrics.jsonl by step, as far as it has numbers."""
        found = {line["step"]: line[name] for line in self.metrics if is_number(line.get(name))}
        return sorted((float(step), float(value)) for step, value in found.items())

    def figure(self, name: str) -> float | None:
        """A number of result.json."""
        value = self.result.get(name)
        return float(value) if is_number(value) else None

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters there are, by what becomes of them; they add up. Empty where run.json does not say."""
        info = self.run.metadata.get("parameters")
        with understood(self.run.folder / "run.json"):
            if info is None:
                return {}
            if self.run.kind == "lora":
                return {name: int(info[name]) for name in ("lora", "embedding", "frozen")}
            return {name: int(info[name]) for name in ("trainable", "frozen")}

    @property
    def files(self) -> list[tuple[Path, int]]:
        """The run's files with their sizes in bytes, those of its product last."""
        with folders.plain_errors(self.run.folder, "read"):
            found = [path for path in sorted(self.run.folder.rglob("*")) if path.is_file() and path.name[0] != "."]
            return sorted(((path, path.stat().st_size) for path in found), key=lambda pair: len(pair[0].parts))


def settings_of_run(run: Run) -> dict[str, Any]:
    """A run's settings, with what an earlier version did where it had none for it."""
    return EARLIER | run.metadata["settings"]


def is_number(value: Any) -> bool:
    """Whether JSON has a finite number there."""
    return type(value) in (int, float) and math.isfinite(value)


def read_facts(root: Path, name: str, evaluations: tuple[str, ...]) -> Facts:
    """The run of that name or path. evaluations: folders of evaluate.py, of any run.

    Raises UsageError where there is no such run, UserError where it has not begun or cannot be read.
    """
    run = find_run(root, name)
    path = run.folder / "metrics.jsonl"
    metrics = read_metrics(path) if path.exists() else []
    made = "made" in run.metadata
    if not made and not metrics and run.metadata.get("identity") == "template":
        raise UserError(f"{run.name} was made by a template, which keeps no figures; train one with training.py")
    with understood(run.folder / "run.json"):
        _check_described(run.metadata, made)
    state = "made" if made else "finished" if run.finished else "training" if RunLock(run.folder).held else "stopped"
    if not metrics and not run.finished:
        raise UserError(f"{run.name} has not taken a step yet, so there is nothing to report: {run.folder}")
    return Facts(run, run.result, metrics, state, dict(_scorecards(run, evaluations)))


def _check_described(about: Mapping[str, Any], made: bool) -> None:
    """Raises ValueError, or as what is missing, for a run.json that lacks what a report tells."""
    shape, settings = about.get("config") or about["shape"], about["settings"]
    wanted = [] if made else [settings["max_iters"], shape["n_layer"], shape["n_embd"]]
    if not all(type(value) is int for value in wanted) or (made and not isinstance(about["made"], dict)):
        raise ValueError(f"whole numbers: {wanted}")
    if about["base"] is not None and not isinstance(about["base"]["run"], str):
        raise ValueError("a base by name")
    _ = settings["lora_rank"] if about["kind"] == "lora" else None


def _scorecards(run: Run, evaluations: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """What evaluate.py left in these folders and in those inside the run's own, as far as it is of this run."""
    inside = [path.parent for path in sorted(run.folder.glob(f"*/{SCORECARD}"))]
    for folder in dict.fromkeys([*map(Path, evaluations), *inside]):
        path = folder / SCORECARD
        with folders.plain_errors(path, "read"):
            told = read_json(path.read_bytes(), str(path))
        with understood(path):
            scorecard_rows(told)
            _ = str(told["verdict"]), list(told["notes"])
        if told["run"] == run.name:
            yield str(folder), told
