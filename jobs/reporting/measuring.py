"""What no file of a run says, and what its model and its data are asked for: changes, forgetting, lint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.chat import Template
from data.instructions.files import files_of
from data.instructions.folio_pairs import folio_pairs_files
from data.instructions.records import parse_columns
from data.linting.lint import How, Report, lint
from jobs.adapting import forgetting
from jobs.adapting.adapted import Adapted, held_out, open_adapters, texts_of
from jobs.adapting.report import sizes
from jobs.looking.measure import measure_by
from jobs.looking.progress import told
from jobs.reporting.facts import Facts
from jobs.runs.base import Base, base_of
from lora.combine import DeltaSize
from runtime.console import say
from runtime.device import Machine
from runtime.errors import UserError
from runtime.settings.config import RECORD_SETS, Settings, has_records
from runtime.training.steps import evaluate

UNKNOWN_TEXT = (
    "What it forgets: {} does not say what it was trained on. evaluate.py --base-text FILE measures it on a text."
)


@dataclass
class Measured:
    """What was found; each part is empty where there is none. forgetting: by a text's name, whose it is and the loss on
    it before and after. notes: what could not be measured, and why."""

    changes: Mapping[str, DeltaSize] = field(default_factory=dict)
    forgetting: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    lint: Report | None = None
    lint_how: str = ""
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure; where that fails it is a note, and no reason to do without the rest."""
        try:
            measure()
        except UserError as error:
            self.notes.append(f"{what} could not be measured: {error}")


@dataclass(frozen=True)
class Wish:
    """batches: of held-out text, to measure forgetting on."""

    root: Path
    data_dir: Path
    batches: int
    machine: Machine


def measure(facts: Facts, wish: Wish) -> Measured:
    """All that can be measured of a run."""
    run, found = facts.run, Measured()
    say(f"Measuring {run.name} ...")
    if run.kind == "lora":
        found.attempt("What it changes and what it forgets", lambda: _of_adapter(facts, wish, found))
    elif run.kind == "full" and facts.run.metadata["base"]:
        found.attempt("What it forgets", lambda: _of_whole(facts, wish, found))
    if facts.state != "made" and has_records(facts.settings["dataset"]):
        found.attempt("The data", lambda: _of_data(facts, wish, found))
    return found


def _of_adapter(facts: Facts, wish: Wish, found: Measured) -> None:
    (adapted,) = open_adapters(wish.root, (str(facts.run.folder.absolute()),))
    found.changes = sizes(adapted)
    if texts_of(adapted.base.run):
        found.attempt("What it forgets", lambda: _forgotten_by_adapter(adapted, wish, found))
    else:
        found.notes.append(UNKNOWN_TEXT.format(adapted.base.run.name))


def _forgotten_by_adapter(adapted: Adapted, wish: Wish, found: Measured) -> None:
    roles = forgetting.texts_to_measure(adapted, "")
    losses = forgetting.measure(adapted, list(roles), [0.0, 1.0], wish.batches, wish.data_dir, wish.machine)
    found.forgetting = {text: (roles[text], before, after) for text, (before, after) in losses.items()}


def _of_whole(facts: Facts, wish: Wish, found: Measured) -> None:
    """The same of a run that trained all weights of its base."""
    run, base = facts.run, base_of(wish.root, facts.run)
    roles = dict.fromkeys(texts_of(run), "the run's") | dict.fromkeys(texts_of(base.run), "the base's")
    if not texts_of(base.run):
        found.notes.append(UNKNOWN_TEXT.format(base.run.name))
    else:
        tuned = replace(base, model=Base.of(run).model)
        for text, role in roles.items():
            windows = held_out(text, run, base, wish.data_dir, wish.batches)
            before, after = (
                evaluate(side.model.to(wish.machine.device), windows, wish.machine) for side in (base, tuned)
            )
            found.forgetting[text] = role, before, after


def _of_data(facts: Facts, wish: Wish, found: Measured) -> None:
    """Lint the records, as `dataset.py lint` does on the base that they were trained on."""
    dataset, columns = facts.settings["dataset"], facts.settings.get("columns", "")
    changed = {"checkpoints_dir": str(wish.root), "data_dir": str(wish.data_dir), "template": "", "base": facts.base}
    settings = Settings.from_dict(facts.settings | changed)
    files = folio_pairs_files(wish.data_dir) if dataset in RECORD_SETS else files_of(dataset)
    counted = measure_by(settings, None)
    if source := facts.run.metadata.get("template"):
        counted = replace(counted, template=Template.of(source, counted.tokenizer))
    how = How(parse_columns(columns), settings.val_size, counted.tokens, counted.context, watch=told)
    found.lint, found.lint_how = lint(files, how), counted.how
