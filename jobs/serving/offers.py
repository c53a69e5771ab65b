"""What a server offers: a base and its adapters, each as a model with a name of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.chat import Template
from jobs.adapting.adapted import open_adapters
from jobs.generating.choice import attach_all, newest, template_for
from jobs.generating.options import PLAIN, TUNED
from jobs.runs.base import Base, base_of
from lora.attach import Strengths, activate
from models.generation.choosing import Sampling
from models.pretrained.source import find_source
from runtime.errors import UserError
from runtime.storage.runs import Run, all_runs


@dataclass(frozen=True)
class Offer:
    """A model that clients may name. strengths: of the adapters, as they are called on the model. how: tokens are drawn
    where a client does not say. ends: texts that end one."""

    name: str
    strengths: Strengths
    template: Template | None
    how: Sampling
    ends: tuple[str, ...]


@dataclass(frozen=True)
class Offers:
    """A base with its adapters attached. adapters: their runs by name. attached: what each is called on the model.
    models: offers by their names, the base first."""

    base: Base
    adapters: Mapping[str, Run]
    attached: Mapping[str, str]
    models: Mapping[str, Offer]

    @classmethod
    def open(cls, root: Path, run_name: str, names: Sequence[str]) -> Offers:
        """A run's base, the newest run's without a name, with these adapters, or with all that were trained on it.

        Raises UsageError for a name that there is not, UserError for adapters of another base and what is corrupted.
        """
        run = find_source(root, run_name) if run_name else newest(root)
        base = base_of(root, run) if run.kind == "lora" else Base.of(run)
        names = list(dict.fromkeys(names)) or [run.name for run in all_runs(root) if _is_adapter_of(run, base)]
        adapted = open_adapters(root, tuple(names)) if names else []
        if adapted and adapted[0].base.sha256 != base.sha256:
            raise UserError(f"{names[0]}: it was trained on {adapted[0].base.run.name}, and not on {base.run.name}")
        base, runs = adapted[0].base if adapted else base, {item.run.name: item.run for item in adapted}
        attached = attach_all(adapted, list(runs))
        activate(base.model)
        offers = cls(base, runs, attached, {})
        models = {base.run.name: offers.of({})} | {name: offers.of({name: 1.0}) for name in runs}
        return replace(offers, models=models)

    def of(self, strengths: Strengths) -> Offer:
        """What the base offers with adapters, by their names. Raises UserError where their templates differ."""
        template, tuned = template_for(self.base, [self.adapters[name] for name in strengths])
        how = Sampling(**(TUNED if tuned else PLAIN), stop_ids=self.base.tokenizer.stop_ids)
        ends = (template.end,) if tuned and not self.base.tokenizer.stop_ids else ()
        name = next(iter(strengths)) if list(strengths.values()) == [1.0] else self.base.run.name
        return Offer(name, {self.attached[name]: s for name, s in strengths.items()}, template, how, ends)


def _is_adapter_of(run: Run, base: Base) -> bool:
    return run.kind == "lora" and run.finished and run.metadata["base"].get("sha256") == base.sha256
