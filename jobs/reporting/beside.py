"""A report on one run, or on several with what differs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.reporting.blocks import Block, Code, Figures, Lines, Page, Section, Series, Table, Text
from jobs.reporting.facts import Facts
from jobs.reporting.measuring import Measured
from jobs.reporting.sections import MOST, figures, sections, settings_told, thinned, what_was_run

NOTHING = "–"
FEW = 60  # points of a training loss beside others, whose noise would hide them
CURVES = {
    "val_loss": ("Validation loss", "nats a token"),
    "loss": ("Training loss", "nats a token"),
    "lr": ("Learning rate", "learning rate"),
    "tokens_per_second": ("Tokens a second", "tokens a second"),
}


def page(runs: Sequence[tuple[Facts, Measured]], command: str) -> Page:
    """The report on these runs. command: what made it."""
    made = Section("This report", [Code([command])])
    if len(runs) == 1:
        ((facts, measured),) = runs
        return Page(
            facts.run.name, what_was_run(facts), [Figures(figures(facts))], [*sections(facts, measured, True), made]
        )
    each = [
        Section(facts.run.name, [Text(what_was_run(facts))], sections(facts, measured, False))
        for facts, measured in runs
    ]
    all_facts = [facts for facts, _ in runs]
    title = " beside ".join(facts.run.name for facts in all_facts)
    lead = f"{len(runs)} runs side by side: what they came to, how their curves went, and which settings differ."
    together = Section("Side by side", below=[results(all_facts), curves(all_facts), differences(all_facts)])
    return Page(title, lead, [], [together, *each, made])


def results(runs: Sequence[Facts]) -> Section:
    """What each run came to, a column a run."""
    columns = [{name.partition(", at step")[0]: value for name, value in figures(facts)} for facts in runs]
    columns = [{"state": facts.state} | column for facts, column in zip(runs, columns, strict=True)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, NOTHING) for column in columns)] for name in names]
    return Section("Results", [Table("What each run came to", ["", *(f.run.name for f in runs)], rows)])


def curves(runs: Sequence[Facts]) -> Section:
    """Each kind of curve of all runs in one chart."""
    found: list[Block] = []
    for name, (title, y) in CURVES.items():
        points = [thinned(facts.curve(name), FEW if name == "loss" else MOST) for facts in runs]
        series = [
            Series(facts.run.name, points[i], i, dots=name == "val_loss" and len(points[i]) <= 40)
            for i, facts in enumerate(runs)
            if points[i]
        ]
        if series:
            found.append(Lines(title, "step", y, series, from_zero=name in ("lr", "tokens_per_second")))
    if any(len(facts.curve("loss")) > FEW for facts in runs):
        found.append(Text("The training loss is shown as means of neighbouring steps."))
    if len({facts.run.metadata.get("tokenizer_sha256") for facts in runs}) > 1:
        found.append(Text("The runs have different tokenizers, so their losses a token do not compare."))
    return Section("Curves", found or [Text("No run has a curve.")])


def differences(runs: Sequence[Facts]) -> Section:
    """The settings that differ, a column a run."""
    told = [settings_told(facts) for facts in runs]
    names = dict.fromkeys(name for each in told for name in each)
    rows = [[name, *(each.get(name, NOTHING) for each in told)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    table = Table("Settings that differ", ["setting", *(facts.run.name for facts in runs)], rows)
    return Section("Settings that differ", [table] if rows else [Text("No setting differs.")])
