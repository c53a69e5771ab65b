"""The sections of a report on one run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from data.linting.rules import RULES
from jobs.adapting.adapted import texts_of
from jobs.adapting.plots import grid_of
from jobs.judging.rendering import described, scorecard_rows, signs
from jobs.looking.linted import counted
from jobs.reporting.blocks import Bar, Block, Code, Heat, Lines, Sample, Section, Series, Table, Text
from jobs.reporting.facts import Facts, Points, settings_of_run, understood
from jobs.reporting.measuring import Measured
from jobs.runs.job import command_of
from jobs.summaries.text import counted_words
from runtime.errors import UserError
from runtime.progress import duration
from runtime.report import size
from runtime.settings.config import Settings
from runtime.settings.fields import format_value, settings_of
from runtime.storage.runs import open_run

MOST = 300  # points of a line
PARTS = {  # of the parameters, with the numbers of their colours
    "trainable": ("trained", 0),
    "lora": ("trained: adapters", 0),
    "embedding": ("trained: embeddings", 1),
    "frozen": ("frozen", 7),
}


def thinned(points: Points, most: int = MOST) -> Points:
    """At most so many points, each the mean of its neighbours, in equal numbers."""
    together = math.ceil(len(points) / most)
    parts = [points[i : i + together] for i in range(0, len(points), together)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts] if together > 1 else points


def what_was_run(facts: Facts) -> str:
    """The run in two or three sentences."""
    s, about = facts.settings, facts.run.metadata
    texts = ", ".join(Path(text).name for text in texts_of(facts.run))
    on, base = f" on {texts}" if texts else "", (about["base"] or {}).get("run", "")
    if facts.state == "made":
        return f"{facts.run.name} was made, not trained: {made_of(about['made'])}. Its base is {base}."
    if facts.run.kind == "lora":
        what = f"{facts.run.name} is an adapter ({s.get('lora_variant', 'lora')}, rank {s['lora_rank']}) of {base}"
    elif facts.run.kind == "full":
        what = f"{facts.run.name} is {base} with all its weights trained further"
    else:
        shape = about.get("config") or about["shape"]
        sizes = f"{counted(shape['n_layer'], 'block')}, {shape['n_embd']} wide"
        what = f"{facts.run.name} is a GPT of {sizes}, trained from scratch"
    quick = " It is a run in TEST_MODE, which shows that everything works and not how well." if s["test_mode"] else ""
    return f"{what}{on}. {state_in_words(facts)} {losses_in_words(facts)}".rstrip() + quick


def made_of(made: Mapping[str, Any]) -> str:
    """How a run was made that was not trained."""
    said = {name: value for name, value in made.items() if name not in ("how", "sha256") and value is not None}
    return ", ".join([str(made.get("how", "")), *(f"{name} {_plain(value)}" for name, value in said.items())])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(" x ".join(map(str, part)) if isinstance(part, list) else str(part) for part in value)
    return str(value)


def state_in_words(facts: Facts) -> str:
    """How far the run came."""
    s, seconds = facts.settings, facts.figure("seconds")
    if facts.state == "finished":
        took = f" in {duration(seconds)}" if seconds is not None else ""
        stopped = "" if facts.step >= s["max_iters"] else f" of {s['max_iters']:,}, as the loss fell no further"
        when = f"{datetime.fromtimestamp(facts.run.written):%Y-%m-%d}"
        return f"It finished on {when}, after {facts.step:,} steps{stopped}{took}."
    if facts.state == "training":
        return f"It is still training: {facts.step:,} of {s['max_iters']:,} steps are done."
    return f"It was stopped after {facts.step:,} of {s['max_iters']:,} steps, and the same command goes on with it."


def losses_in_words(facts: Facts) -> str:
    """What it came to, beside its base where there is one."""
    loss, before = facts.figure("val_loss"), facts.figure("base_val_loss")
    if loss is None:
        return ""
    told = f"Over all that was held out its loss is {loss:.4f} nats a token"
    if before is None:
        return f"{told}."
    side = "higher" if before > loss else "lower"
    return f"{told}; without the adapter it is {before:.4f} ({abs(before - loss):.4f} {side})."


def figures(facts: Facts) -> list[tuple[str, str]]:
    """The few numbers that a run comes to; those that there are."""
    names = {
        "val_loss": "loss, all held out",
        "base_val_loss": "the base's loss",
        "bits_per_character": "bits per character",
    }
    known = {key: value for key in names if (value := facts.figure(key)) is not None}
    found = [(names[key], f"{value:.4f}") for key, value in known.items()]
    lowest = min(facts.curve("val_loss"), key=lambda point: point[1], default=(None, None))
    step, best = facts.figure("best_step") or lowest[0], facts.figure("best") or lowest[1]
    if step is not None and best is not None:
        found.append((f"best validation loss, at step {step:,.0f}", f"{best:.4f}"))
    if facts.metrics:
        found.append(("steps", f"{facts.step:,}"))
        speed = facts.figure("tokens_per_second") or dict(facts.curve("tokens_per_second")).get(facts.step)
        found += [("tokens a second", f"{speed:,.0f}")] if speed else []
    if (seconds := facts.figure("seconds")) is not None:
        found.append(("training", duration(seconds)))
    if memory := facts.figure("peak_memory"):
        found.append(("peak memory", size(int(memory))))
    return found


def parameters(facts: Facts) -> Section | None:
    """The parameters as a bar that adds up."""
    if not (counts := facts.parameters):
        return None
    parts = [(label, counts[name], colour) for name, (label, colour) in PARTS.items() if counts.get(name)]
    bar = Bar("Parameters", parts)
    trained = bar.total - counts["frozen"]
    told = f"{trained:,} of {bar.total:,} parameters train, {100 * trained / bar.total:.2f} %."
    return Section("Parameters", [Text(told), bar])


def curves(facts: Facts) -> list[Section]:
    """Loss, learning rate and speed over the steps."""
    loss, val = facts.curve("loss"), facts.curve("val_loss")
    series = [Series("training loss", thinned(loss), 0, faint=True)] if loss else []
    series += [Series("validation loss", val, 1, dots=len(val) <= 40)] if val else []
    if not series:
        return []
    found: list[Block] = [Lines("Loss over the steps", "step", "nats a token", series)]
    if len(thinned(loss)) < len(loss):
        found.append(Text(f"Each point of the training loss is the mean of {math.ceil(len(loss) / MOST)} steps."))
    if val:
        rows = [[f"{step:,.0f}", f"{value:.4f}"] for step, value in val]
        found.append(Table("Validation loss", ["step", "loss"], rows, folded=True))
    others = {"lr": ("Learning rate", "learning rate"), "tokens_per_second": ("Tokens a second", "tokens a second")}
    charts = [
        Lines(title, "step", y, [Series(y, thinned(points), 2 + i)], from_zero=True)
        for i, (name, (title, y)) in enumerate(others.items())
        if (points := facts.curve(name))
    ]
    notes = [Text("The learning rate of each step, and the mean speed since the run began or went on.")]
    machine = facts.run.metadata.get("machine")
    notes += [Text(f"On {machine}.")] if machine else []
    return [Section("Loss", found), Section("Learning rate and speed", [*charts, *notes] if charts else notes)]


def samples(facts: Facts) -> Section | None:
    """What the model said at the end of its training."""
    if not (told := facts.result.get("samples")):
        again = shlex.join(["python", "generate.py", "--run", facts.run.name])
        return (
            Section("Samples", [Text("The run kept none. To see some:"), Code([again])]) if facts.run.finished else None
        )
    with understood(facts.run.folder / "result.json"):
        return Section("Samples", _texts(told) if "texts" in told else _answers(told))


def _texts(told: Mapping[str, Any]) -> list[Block]:
    found: list[Block] = []
    if any(text["marked"] for text in told["texts"]):
        found.append(Text(f"Marked are {told['counted']}."))
    for text in told["texts"]:
        found.append(Sample(f"Sample {text['title']}".strip(), str(text["text"]), frozenset(map(str, text["marked"]))))
        found.append(Text(f"{counted_words(told, text)}."))
    return found


def _answers(told: Mapping[str, Any]) -> list[Block]:
    found: list[Block] = []
    for answer in told["answers"]:
        found += [Sample("Asked", str(answer["asked"])), Sample("Wanted", str(answer["wanted"]))]
        found += [Sample(f"Answer {title}".strip(), str(text)) for title, text in answer["said"].items()]
    copies = [f"{count} of {told['of']} answers {title}".rstrip() for title, count in told["copied"].items()]
    return [*found, Text(f"Word for word what was learned for another prompt: {', '.join(copies)}.")]


def changes(measured: Measured) -> Section | None:
    """How much of each weight an adapter changes."""
    if not measured.changes:
        return None
    rows, columns, grid = grid_of(measured.changes, "relative")
    values = [[None if math.isnan(value) else 100 * float(value) for value in row] for row in grid]
    largest = 100 * max(size.relative for size in measured.changes.values())
    form = "{:.0f}" if largest >= 20 else "{:.1f}" if largest >= 2 else "{:.2f}"
    heat = Heat("‖ΔW‖ / ‖W‖ of each linear, in per cent", "block", columns, list(zip(rows, values, strict=True)), form)
    most = max(measured.changes, key=lambda path: measured.changes[path].relative)
    told = f"The size of the change as a share of the weight's (Frobenius norms). It is largest in {most}."
    return Section("What each linear learned", [Text(told), heat])


def forgetting(measured: Measured) -> Section | None:
    """The loss on the run's text and its base's, before and after."""
    if not measured.forgetting:
        return None
    rows = [
        [f"{Path(text).name} ({role})", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
        for text, (role, before, after) in measured.forgetting.items()
    ]
    table = Table("Loss on held-out text, nats a token", ["text", "base", "run", "change"], rows)
    forgot = [(text, after - before) for text, (role, before, after) in measured.forgetting.items() if "base" in role]
    told = [
        f"On {Path(text).name} the loss {'rose' if more > 0 else 'fell'} by {abs(more):.4f}." for text, more in forgot
    ]
    return Section("Forgetting", [Text(" ".join(told)), table])


def data(measured: Measured) -> Section | None:
    """What linting finds in the records."""
    if not (found := measured.lint):
        return None
    lost = found.rows - found.records
    unread = f", and {counted(lost, 'row')} that cannot be read as one" if lost else ""
    told = f"{counted(found.records, 'record')}{unread}; {measured.lint_how}."
    rows = [[name, f"{tally.count:,}", RULES[name].says] for name, tally in found.broken.items()]
    table = Table("Rules that records break, by how many", ["rule", "records", "what breaks it"], rows)
    kept = f"{len(found.tallies) - len(rows)} of {len(found.tallies)} rules find nothing."
    return Section("Data", [Text(told), *([table] if rows else []), Text(kept)])


def scorecards(facts: Facts) -> list[Section]:
    """What evaluate.py found."""
    found = []
    for folder, told in facts.scorecards.items():
        head, *rows = scorecard_rows(told)
        with understood(Path(folder) / "report.json"):
            blocks = [Text(f"Verdict: {told['verdict']}."), *map(Text, described(told))]
        table = Table("Scorecard", head[:-1], [row[:-1] for row in rows])
        notes = [Text(str(note)) for note in told["notes"]]
        found.append(Section("Scorecard", [*blocks, table, Text(signs(told)), *notes]))
    return found


def settings(facts: Facts) -> Section:
    """What the run was told, and the commands that make it again."""
    rows = list(settings_told(facts).items())
    commands = [] if facts.state == "made" else commands_of(facts)
    again = [Text("With no .env and no variables set:"), Code(commands)] if commands else []
    return Section("How it was made", [*again, Table("All settings", ["setting", "value"], rows, folded=True)])


def settings_told(facts: Facts) -> dict[str, str]:
    """The settings that the run read, in the order of their table."""
    read = facts.read
    return {
        row.variable: format_value(read[row.name]) for row in settings_of(Settings) if row.identity and row.name in read
    }


def commands_of(facts: Facts) -> list[str]:
    """The command that trains the run, after that of its base where this is a run beside it."""
    said = facts.run.metadata["base"]
    try:
        base = open_run(facts.run.folder.parent / said["run"]) if said else None
        before = [command_of(Settings.from_dict(settings_of_run(base)), "")] if base and base.kind == "base" else []
        return [*before, command_of(Settings.from_dict(facts.settings), facts.base)]
    except UserError:  # the base cannot be read, or this version does not know these settings any more
        return []


def files(facts: Facts) -> Section:
    """The run's files."""
    rows = [[path.relative_to(facts.run.folder).as_posix(), f"{count:,}"] for path, count in facts.files]
    total = sum(count for _, count in facts.files)
    return Section("Files", [Table(f"In {facts.run.name}, {total:,} bytes in all", ["file", "bytes"], rows)])


def sections(facts: Facts, measured: Measured, with_curves: bool) -> list[Section]:
    """All sections that there is something for."""
    found = [
        parameters(facts), *(curves(facts) if with_curves else []), samples(facts), changes(measured),
        forgetting(measured), data(measured), *scorecards(facts), settings(facts), files(facts),
    ]  # fmt: skip
    notes = [Section("Not measured", list(map(Text, measured.notes)))] if measured.notes else []
    return [section for section in (*found, *notes) if section]
