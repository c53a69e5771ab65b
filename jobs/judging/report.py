"""The report as one object, from which everything that is printed and written is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.instructions.records import Record
from jobs.judging.judge import Findings
from jobs.judging.rendering import markdown, shown
from jobs.judging.rules import BY_HEART, CHRF, EXACT, HIGHER, LOWER, SHARE, TRAINING_LOSS, WANTED_LOSS
from jobs.judging.scorecard import BASE, BETTER, EQUAL, RUN, UNCLEAR, WANTED, WORSE, Row
from runtime.storage.encoding import to_json

MOST = 10  # of the worst answers
INTERVALS = "Intervals are of 95 %."
CHANCE = (
    "A run is better or worse where it is so on clearly more prompts (sign test, p < 0.05, for "
    "which at least 6 must differ), and one rule in twenty would be by chance. Rules overlap, so their number is no "
    "measure of how much better."
)
BLIND = (
    "Rules compare and count words. They cannot tell whether an answer is true, helpful or in the right tone, nor "
    "whether another wording than the wanted one is as good, and they find personal data only by its form: read the "
    "answers."
)


def to_report(about: Mapping[str, Any], findings: Findings, records: Sequence[Record], notes: Sequence[str]) -> dict:
    """All that is told, ready for JSON. about: run, base, data and how answers were made."""
    rows = [row.as_dict() for row in findings.rows]
    worst = [_answer(findings, records, i) for i in _worst(findings)]
    notes = [*_overfitting(rows), *notes]
    if findings.left_out:
        notes.append(f"Left out, as they apply to no answer here: {', '.join(findings.left_out)}.")
    notes += [f"{INTERVALS} {CHANCE}" if about["base"] else INTERVALS, BLIND]
    told = {"verdict": verdict(rows, len(records)), "rules": rows, "notes": notes, "worst": worst}
    return dict(about) | told


def _overfitting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the run has learned its records by heart, in a sentence; none where these are not known."""
    named = {row["name"]: row for row in rows}
    if TRAINING_LOSS not in named or BY_HEART not in named:
        return []
    losses = [shown(named[name], RUN) for name in (WANTED_LOSS, TRAINING_LOSS)]
    return [
        f"Overfitting: the loss of the run is {losses[0]} on these records and {losses[1]} on training records; "
        f"{shown(named[BY_HEART], RUN)} of the prompts got a training output word for word that was not wanted."
    ]


def answer_lines(findings: Findings, records: Sequence[Record]) -> bytes:
    """Every prompt with its answers and what each rule says of them, as JSON lines."""
    lines = [_answer(findings, records, i) for i in range(len(records))]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode(errors="backslashreplace")


def _worst(findings: Findings) -> list[int]:
    """The run's answers that are furthest from the wanted ones, and are not the same; of those as far, the first."""
    near, exact = (
        next(row.scores[RUN] for row in findings.of_answers if row.rule.name == name) for name in (CHRF, EXACT)
    )
    return sorted((i for i in range(len(near)) if not exact[i]), key=lambda i: near[i])[:MOST]


def _answer(findings: Findings, records: Sequence[Record], i: int) -> dict[str, Any]:
    """A prompt with the answers to it, and by column the scores of each rule that applies to answers."""
    judged = {name: each[i] for name, each in findings.judged.items()}
    about = {"where": records[i].where, "asked": judged[RUN].asked, WANTED: judged[RUN].wanted}
    texts = {name: judged[name].text for name in judged if name != WANTED}
    scores = {name: {row.rule.name: row.scores[name][i] for row in findings.of_answers} for name in texts}
    return about | texts | {"scores": scores, "faults": _faults(findings.of_answers, i)}


def _faults(rows: Sequence[Row], i: int) -> list[str]:
    """The rules that find a fault with the run's answer."""
    shares = [(row, row.scores[RUN][i]) for row in rows if row.rule.kind == SHARE and row.rule.better]
    none_at_all = [row.rule.name for row, score in shares if row.rule.better == HIGHER and score == 0]
    return none_at_all + [row.rule.name for row, score in shares if row.rule.better == LOWER and score]


def verdict(rows: Sequence[Mapping[str, Any]], prompts: int) -> str:
    """One line on rows of the report: on how many rules the run is better than its base, and which is the worst;
    without a base, how near it is to what is wanted. Where it is nowhere worse, the most frequent fault."""
    told = f"on {prompts} prompt{'' if prompts == 1 else 's'} "
    outcomes = [row["outcome"] for row in rows if "outcome" in row]
    if outcomes:
        told += f"better than the base on {outcomes.count(BETTER)} of {len(outcomes)} rules, worse on "
        told += f"{outcomes.count(WORSE)}, with no clear difference on {outcomes.count(UNCLEAR)}, equal on "
        told += f"{outcomes.count(EQUAL)}"
    else:
        near = [f"{row['name']} {shown(row, RUN)}" for row in rows if row["name"] in (EXACT, CHRF)]
        told += f"{', '.join(near)}, with no base to compare"
    return f"{told}; {_weakness(rows)}"


def _weakness(rows: Sequence[Mapping[str, Any]]) -> str:
    if worse := [row for row in rows if row.get("outcome") == WORSE]:
        row = min(worse, key=lambda row: (row["p"], row["better_on"] - row["worse_on"]))
        return f"worst: {row['name']} ({shown(row, RUN)} instead of {shown(row, BASE)})"
    faults = [row for row in rows if row["better"] == LOWER and row["kind"] == SHARE and row[RUN] and row[RUN]["value"]]
    if not faults:
        return "no rule finds a fault"
    row = max(faults, key=lambda row: row[RUN]["value"])
    return f"most frequent fault: {row['name']} ({shown(row, RUN)})"


def files(report: Mapping[str, Any], findings: Findings, records: Sequence[Record]) -> dict[str, bytes]:
    """What --out has."""
    return {
        "report.json": to_json(dict(report)),
        "report.md": markdown(report).encode(errors="backslashreplace"),
        "answers.jsonl": answer_lines(findings, records),
    }
