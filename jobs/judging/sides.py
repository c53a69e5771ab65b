"""Who is judged: a run, and its base beside it where that is known."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from data.chat import GUIDE, Template
from data.tokenizers import Tokenizer
from jobs.generating.choice import choose
from jobs.judging.scorecard import BASE, RUN
from jobs.runs.base import Base, base_of
from lora.attach import Strengths, using
from models.pretrained.source import find_source
from models.transformer import Transformer
from runtime.device import Machine
from runtime.errors import UsageError, UserError
from runtime.storage.runs import Run


@dataclass(frozen=True)
class Side:
    """A model, and how strongly which of its adapters count."""

    model: Transformer
    strengths: Strengths = field(default_factory=dict)

    def active(self) -> AbstractContextManager:
        """Computing with this side's adapters within a `with` block."""
        return using(self.model, self.strengths)


@dataclass(frozen=True)
class Opened:
    """A run with the sides that are judged, in the order of the columns. base: the run that it started from, or None.
    template: how both are asked. notes: what a reader of the report must know of these."""

    run: Run
    base: Run | None
    sides: dict[str, Side]
    tokenizer: Tokenizer
    template: Template
    notes: list[str]

    @property
    def tokens(self) -> int:
        """How many the models take at a time."""
        return min(side.model.config.max_positions for side in self.sides.values())

    @property
    def window(self) -> int:
        """How many tokens of a record the run was trained on."""
        return min(self.run.metadata.get("window", self.tokens), self.tokens)

    @property
    def under(self) -> Side | None:
        """The side whose perplexity is measured: the base's, which a base by itself is; None where it is not known."""
        return self.sides.get(BASE) or (self.sides[RUN] if self.run.kind == "base" else None)


def open_sides(root: Path, name: str, strength: float | None, machine: Machine) -> Opened:
    """A run by its name, or the folder or hub name of a pretrained model, on the machine's device. strength: of a LoRA
    run's adapter, 1 where it is None.

    Raises UsageError for a name that there is not and a strength of what has no adapter, UserError for what is
    corrupted.
    """
    run = find_source(root, name)
    if strength is not None and run.kind != "lora":
        raise UsageError(f"--strength {strength:g} is of an adapter, and {run.name} has none")
    choice = choose(root, name, None, ())
    opened, notes = choice.base, []
    opened.model.requires_grad_(False).to(machine.device)
    if run.kind == "lora":
        strengths = choice.on_model(dict.fromkeys(choice.default, 1.0 if strength is None else strength))
        base, sides = opened.run, {BASE: Side(opened.model), RUN: Side(opened.model, strengths)}
    else:
        base, sides = None, {RUN: Side(opened.model)}
        if run.metadata.get("base"):
            base, sides, notes = _beside(root, run, opened, machine)
    if not choice.template:
        notes.append(f"{run.name} has no chat template: it was asked in the form ### Instruction, ### Response.")
    return Opened(run, base, sides, opened.tokenizer, choice.template or Template.of(GUIDE, opened.tokenizer), notes)


def _beside(root: Path, run: Run, opened: Base, machine: Machine) -> tuple[Run | None, dict[str, Side], list[str]]:
    """A fully fine-tuned run with its base before it, or alone where that cannot be found or has other tokens."""
    alone = {RUN: Side(opened.model)}
    try:
        base = base_of(root, run)
    except UserError as error:
        return None, alone, [f"Its base is not beside it: {error}."]
    if base.tokenizer.sha256 != opened.tokenizer.sha256:
        return None, alone, [f"Its base {base.run.name} is not beside it, as it has another tokenizer."]
    base.model.requires_grad_(False).to(machine.device)
    return base.run, {BASE: Side(base.model), **alone}, []
