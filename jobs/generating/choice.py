"""Which base and which of its adapters text is sampled from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.chat import Template, own_template
from jobs.adapting.adapted import Adapted, base_name, open_adapters
from jobs.runs.base import Base, base_of
from lora.attach import Strengths
from models.pretrained.source import find_source
from runtime.errors import UsageError, UserError
from runtime.settings.fields import DECIMAL
from runtime.start import command_line
from runtime.storage.runs import Run, all_runs

NONE = "none"


@dataclass(frozen=True)
class Choice:
    """A base whose model carries every adapter that was named, and what counts where nothing else is said.

    attached: what each adapter is called on the model, which takes fewer names than a run may have. template: how
    instructions and chats are written for it, or None. tuned: whether that is how a run of these was trained.
    """

    base: Base
    attached: dict[str, str]
    default: Strengths
    template: Template | None = None
    tuned: bool = False

    def on_model(self, strengths: Strengths | None) -> Strengths:
        """The strengths as `lora.attach.activate` takes them; None stands for the default."""
        chosen = self.default if strengths is None else strengths
        return {self.attached[name]: strength for name, strength in chosen.items()}


def parse_adapters(texts: Sequence[str]) -> Strengths:
    """Adapters out of `folio`, `folio=0.5` (at that strength; a run's name has no '='), or `none` by itself.

    Raises UsageError for a strength that is no number, and for what contradicts itself.
    """
    strengths: Strengths = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        name, number = (name, number) if equals else (text, "1")
        if not DECIMAL.fullmatch(number) or not math.isfinite(float(number)):
            raise UsageError(f"adapter {text}: what follows '=' must be a number, the adapter's strength")
        if name in strengths:
            raise UsageError(f"adapter {name} is given twice")
        strengths[name] = float(number)
    if NONE in strengths and list(texts) != [NONE]:
        raise UsageError(f"adapter {NONE} stands for the plain base, so it goes with no strength and no other adapter")
    return {} if NONE in strengths else strengths


def in_words(strengths: Strengths) -> str:
    """Adapters as `parse_adapters` takes them, with commas between them."""
    return ", ".join(name if s == 1 else f"{name}={s:g}" for name, s in strengths.items()) or NONE


def choose(root: Path, run_name: str, wanted: Strengths | None, others: Iterable[str]) -> Choice:
    """The base, with the wanted adapters and others on it; without a run's name, the base that they were trained on.

    wanted: None for the run's own adapter; where no run is named but others are, for the plain base. Without any name
    it is the newest run that counts.

    Raises UsageError for a name that there is not, UserError for adapters of another base, and for corrupted files.
    """
    others, run = list(others), find_source(root, run_name) if run_name else None
    if run is None and not wanted and not others:
        run = newest(root)
    if wanted is None:
        wanted = {name_in(root, run): 1.0} if run and run.kind == "lora" else {}
    names = tuple(dict.fromkeys([*wanted, *others]))
    if not names:
        base = base_of(root, run) if run.kind == "lora" else Base.of(run)
        return Choice(base, {}, {}, *template_for(base, [run]))  # the base is asked as its adapter would be
    adapted = open_adapters(root, names)
    base = adapted[0].base
    if run and not _is_on(run, base):
        on = f"{run.name} is on {base_name(run)}" if run.kind == "lora" else f"{run.name} is another model"
        raise UserError(f"{names[-1]}: it was trained on {base.run.name}, and {on}")
    attached = attach_all(adapted, names)
    return Choice(base, attached, wanted, *template_for(base, [item.run for item in adapted]))


def attach_all(adapted: Sequence[Adapted], names: Sequence[str]) -> dict[str, str]:
    """Attach adapters to the model of their base; what each is called there, by its name."""
    attached = {name: f"adapter_{i}" for i, name in enumerate(names)}
    for name, item in zip(names, adapted, strict=True):
        item.adapter.attach_to(item.base.model, attached[name], item.base.sha256)
    return attached


def template_for(base: Base, runs: Sequence[Run]) -> tuple[Template | None, bool]:
    """How chats are written for a base and runs on it, and whether one of these was trained so. Raises UserError where
    they were trained on different templates."""
    told = {source: run.name for run in [base.run, *runs] if (source := run.metadata.get("template"))}
    if len(told) > 1:
        raise UserError(f"{' and '.join(told.values())} were trained on different templates, and do not go together")
    found = [Template.of(source, base.tokenizer) for source in told]
    return (found[0], True) if found else (own_template(base.tokenizer), False)


def _is_on(run: Run, base: Base) -> bool:
    """Whether a run is this base, or an adapter of it."""
    if run.kind == "lora":
        return run.metadata["base"].get("sha256", base.sha256) == base.sha256
    return run.folder.resolve() == base.run.folder.resolve()


def newest(root: Path) -> Run:
    """The newest finished run, else the newest that has saved something; one of TEST_MODE only where no other has."""
    usable = [run for run in all_runs(root) if not run.aside and (run.finished or run.saved("best"))]
    if not usable:
        nothing = f"there is no run in {root} yet that has saved anything"
        raise UserError(f"{nothing}; train one with: {command_line('training.py')}")
    return sorted(usable, key=lambda run: (not run.metadata["settings"]["test_mode"], run.finished))[-1]


def name_in(root: Path, run: Run) -> str:
    """What a run is called on a command line: its name, or for one that is elsewhere its folder, or its hub's name."""
    if hub := run.metadata.get("hub"):
        return hub
    return run.name if run.folder == root / run.name else str(run.folder.absolute())
