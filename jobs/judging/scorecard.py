"""The scorecard: what each rule finds in the answers of base and run, side by side, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.judging.rules import HIGHER, PERPLEXITY, SHARE, Judged, Rule
from jobs.judging.scores.confidence import SIGNIFICANT, mean, normal, sign_test, wilson

WANTED, BASE, RUN = COLUMNS = ("wanted", "base", "run")  # whose answers: the data's, the base's, the run's
BETTER, WORSE, UNCLEAR, EQUAL = "better", "worse", "no clear difference", "equal"  # than the base


@dataclass(frozen=True)
class Row:
    """A rule's scores, by column: one a prompt, None where the rule does not apply. weights: how much each counts."""

    rule: Rule
    scores: Mapping[str, Sequence[float | None]]
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def applies(self) -> bool:
        """Whether there is an answer of a model that the rule says something of."""
        return any(self.figure(column) for column in self.scores if column != WANTED)

    def figure(self, column: str) -> dict[str, float | int] | None:
        """The mean with its 95 % interval and the number of prompts; None where the rule applies to none of them."""
        scores = self.scores.get(column, ())
        weights = self.weights.get(column) or [1.0] * len(scores)
        counted = [(s, w) for s, w in zip(scores, weights, strict=True) if s is not None and w > 0]
        if not counted:
            return None
        values, weights = zip(*counted, strict=True)
        centre = mean(values, weights)
        binary = self.rule.kind == SHARE and set(values) <= {0.0, 1.0} and set(weights) == {1.0}
        interval = wilson(centre, len(values)) if binary else normal(values, weights)
        found = {"value": centre} | (dict(zip(("low", "high"), interval, strict=True)) if interval else {})
        if self.rule.kind == SHARE:
            found = {name: min(1.0, max(0.0, value)) for name, value in found.items()}
        if self.rule.kind == PERPLEXITY:
            found = {name: math.exp(min(value, 700.0)) for name, value in found.items()}
        return found | {"n": len(values)}

    def compared(self) -> dict[str, Any]:
        """On how many prompts the run is better than the base, on how many worse, and what that comes to: `equal` where
        no prompt differs, `better` or `worse` where the sign test has p < 0.05 and the figures agree with it, else `no
        clear difference`; empty where there is nothing to compare."""
        base, run = self.figure(BASE), self.figure(RUN)
        if not (base and run and self.rule.better):
            return {}
        sign = 1 if self.rule.better == HIGHER else -1
        both = [(b, r) for b, r in zip(self.scores[BASE], self.scores[RUN], strict=True) if None not in (b, r)]
        better, worse = (sum(s * (r - b) > 0 for b, r in both) for s in (sign, -sign))
        p, gain = sign_test(better, worse), sign * (run["value"] - base["value"])
        clear = p < SIGNIFICANT and gain * (better - worse) > 0
        outcome = (BETTER if better > worse else WORSE) if clear else UNCLEAR if better + worse else EQUAL
        return {"better_on": better, "worse_on": worse, "p": p, "outcome": outcome}

    def as_dict(self) -> dict[str, Any]:
        """The row as the report has it."""
        rule = self.rule
        about = {"group": rule.group, "name": rule.name, "rule": rule.says, "better": rule.better, "kind": rule.kind}
        return about | {column: self.figure(column) for column in self.scores} | self.compared()


def answer_rows(rules: Sequence[Rule], judged: Mapping[str, Sequence[Judged]]) -> list[Row]:
    """What the rules say of the answers of each column."""
    rows = []
    for rule in rules:
        columns = {name: each for name, each in judged.items() if name != WANTED or rule.of_wanted}
        scores = {name: [rule.score(j) for j in each] for name, each in columns.items()}
        weights = {name: [rule.weight(j) for j in each] for name, each in columns.items()}
        rows.append(Row(rule, scores, weights))
    return rows
