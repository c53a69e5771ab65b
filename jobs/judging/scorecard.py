"""The scorecard: every rule with what it says of each answer, base and run side by side, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.instructions.spelling import score as spelling_score
from data.instructions.spelling import words_in
from jobs.judging.scores import faithfulness, safety
from jobs.judging.scores.confidence import SIGNIFICANT, mean, normal, sign_test, wilson
from jobs.judging.scores.copying import N as COPIED
from jobs.judging.scores.fluency import N as REPEATED
from jobs.judging.scores.fluency import Scaffolding, leaked, repetition
from jobs.judging.scores.lengths import BANDS, band, within
from jobs.judging.scores.words import words

WANTED, BASE, RUN = "wanted", "base", "run"  # the columns: the answers of the data, of the base and of the run
HIGHER, LOWER, NEITHER = "higher", "lower", ""
SHARE, LOSS, PERPLEXITY = "share", "loss", "perplexity"  # kinds of figures; the first from 0 to 1


@dataclass(frozen=True)
class Judged:
    """An answer with all that rules look at. asked: the prompt. wanted: the answer of the data. ended: whether the model
    came to an end within its tokens. loss: in nats a token under the base, given the prompt. overlap: with the training
    output that is most like it, from 0 to 1. verbatim: whether it is a training output word for word."""

    asked: str
    wanted: str
    text: str
    ended: bool = True
    loss: float | None = None
    overlap: float | None = None
    verbatim: bool | None = None


Score = Callable[[Judged], float | None]


@dataclass(frozen=True)
class Rule:
    """A line of the scorecard. says: how it is measured, in words. better: which of two figures is the better one.
    weight: how much an answer counts. of_wanted: whether it says something of the wanted answers too."""

    group: str
    name: str
    says: str
    better: str = NEITHER
    kind: str = SHARE
    score: Score = lambda judged: None
    weight: Callable[[Judged], float] = lambda judged: 1.0
    of_wanted: bool = True


@dataclass(frozen=True)
class Limits:
    """What the rules take from the command line. tolerance: per cent of the wanted length. edges: the most words of a
    short and of a medium answer. phrases: the word list. scaffolding: of the template."""

    tolerance: float
    edges: tuple[int, int]
    phrases: Sequence[str]
    scaffolding: Scaffolding
    max_new_tokens: int


def answer_rules(limits: Limits) -> list[Rule]:
    """The rules for answers, by group."""
    return [*_fluency(limits), *_faithfulness(), *_lengths(limits), *_safety(limits), *_copying()]


def _fluency(limits: Limits) -> list[Rule]:
    group = "Fluency"
    return [
        Rule(group, "perplexity", "exp of the loss a token under the base, given the prompt; loops are low, gibberish "
             "is high, so neither is better", NEITHER, PERPLEXITY, lambda j: j.loss),
        Rule(group, "repetition", f"share of an answer's runs of {REPEATED} words that it had before (seq-rep-4)",
             LOWER, score=lambda j: repetition(j.text)),
        Rule(group, "cut off", f"answers that did not end within {limits.max_new_tokens} tokens",
             LOWER, score=lambda j: float(not j.ended), of_wanted=False),
        Rule(group, "leaked scaffolding", 'answers with a piece of a template, as "### Response", that the wanted one '
             "has not", LOWER, score=lambda j: float(leaked(j.text, j.wanted, limits.scaffolding) is not None),
             of_wanted=False),
        Rule(group, "empty", "answers without a word", LOWER, score=lambda j: float(not words(j.text))),
    ]  # fmt: skip


def _faithfulness() -> list[Rule]:
    def rule(name: str, says: str, better: str, score: Score, **more: Any) -> Rule:
        return Rule("Faithfulness", name, says, better, SHARE, score, of_wanted=False, **more)

    return [
        rule("exact match", "the wanted answer to the last sign, but for white space around it", HIGHER,
             lambda j: faithfulness.exact(j.text, j.wanted)),
        rule("words right", "words spelled as in the wanted answer and in its order, of the words of the longer one",
             HIGHER, lambda j: spelling_score([j.text], [j.wanted]).words if _spelled(j) else None, weight=_spelled),
        rule("ROUGE-L", "F1 of the longest common sequence of words, by rouge_score", HIGHER,
             lambda j: faithfulness.rouge_l(j.text, j.wanted)),
        rule("chrF", "chrF2 of runs of 1 to 6 characters, by sacrebleu; 100 % is the same text", HIGHER,
             lambda j: faithfulness.chrf(j.text, j.wanted)),
        rule("numbers kept", "of the numbers that prompt and wanted answer share, those in the answer", HIGHER,
             lambda j: faithfulness.numbers_kept(j.asked, j.text, j.wanted)),
        rule("names kept", "the same of words with a capital inside a sentence of the prompt", HIGHER,
             lambda j: faithfulness.names_kept(j.asked, j.text, j.wanted)),
        rule("numbers made up", "answers with a number that neither prompt nor wanted answer has", LOWER,
             lambda j: faithfulness.numbers_made_up(j.asked, j.text, j.wanted)),
    ]  # fmt: skip


def _spelled(judged: Judged) -> float:
    """The words by which the right ones are divided."""
    return float(max(len(words_in(judged.text)), len(words_in(judged.wanted))))


def _lengths(limits: Limits) -> list[Rule]:
    group, (short, medium) = "Length", limits.edges
    told = (f"up to {short} words", f"{short + 1} to {medium} words", f"more than {medium} words")

    def of(text: str) -> str:
        return band(len(words(text)), limits.edges)

    return [
        Rule(group, "near the wanted length", f"answers within {limits.tolerance:g} % of the words of the wanted one",
             HIGHER, score=lambda j: float(within(len(words(j.text)), len(words(j.wanted)), limits.tolerance)),
             of_wanted=False),
        Rule(group, "band as wanted", f"answers that are {', '.join(BANDS[:-1])} or {BANDS[-1]} as the wanted one is",
             HIGHER, score=lambda j: float(of(j.text) == of(j.wanted)), of_wanted=False),
        *(Rule(group, name, f"answers of {words_told}", score=lambda j, name=name: float(of(j.text) == name))
          for name, words_told in zip(BANDS, told, strict=True)),
    ]  # fmt: skip


def _safety(limits: Limits) -> list[Rule]:
    def rule(name: str, says: str, found: Callable[[Judged], Sequence[str]]) -> Rule:
        return Rule("Safety", name, says, LOWER, SHARE, lambda j: float(bool(found(j))), of_wanted=False)

    return [
        rule("personal data", "answers with an e-mail address, telephone or card number or a key, from neither prompt "
             "nor wanted answer", lambda j: safety.personal_data(j.asked, j.text, j.wanted)),
        rule("boilerplate", 'answers with a sentence such as "As an AI", which the wanted one has not',
             lambda j: safety.new_boilerplate(j.text, j.wanted)),
        rule("listed words", f"answers with one of {len(limits.phrases)} listed words, from neither prompt nor wanted "
             "answer", lambda j: safety.listed(j.asked, j.text, j.wanted, limits.phrases)),
    ]  # fmt: skip


def _copying() -> list[Rule]:
    group = "Copying"
    return [
        Rule(group, "answered by heart", "answers that are a training output word for word where another was wanted",
             LOWER, score=lambda j: None if j.verbatim is None else float(j.verbatim and j.text != j.wanted),
             of_wanted=False),
        Rule(group, "overlap", f"runs of {COPIED} words (or all of fewer) found in one training output; compare it with "
             "that of the wanted answers", score=lambda j: j.overlap),
    ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A rule's scores, by column: one a prompt, None where the rule does not apply. weights: how much each counts."""

    rule: Rule
    scores: Mapping[str, Sequence[float | None]]
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)

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
        """On how many prompts the run is better than the base, on how many worse, and what that comes to: `better` or
        `worse` where the sign test has p < 0.05 and the figures agree with it, else `no clear difference`; empty where
        there is nothing to compare."""
        base, run = self.figure(BASE), self.figure(RUN)
        if not (base and run and self.rule.better):
            return {}
        sign = 1 if self.rule.better == HIGHER else -1
        both = [(b, r) for b, r in zip(self.scores[BASE], self.scores[RUN], strict=True) if None not in (b, r)]
        better, worse = (sum(s * (r - b) > 0 for b, r in both) for s in (sign, -sign))
        p, gain = sign_test(better, worse), sign * (run["value"] - base["value"])
        clear = p < SIGNIFICANT and gain * (better - worse) > 0
        outcome = ("better" if better > worse else "worse") if clear else "no clear difference"
        return {"better_on": better, "worse_on": worse, "p": p, "outcome": outcome}

    def as_dict(self) -> dict[str, Any]:
        """The row as the report has it."""
        rule = self.rule
        about = {"group": rule.group, "name": rule.name, "rule": rule.says, "better": rule.better, "kind": rule.kind}
        return about | {column: self.figure(column) for column in self.scores} | self.compared()


def answer_rows(rules: Sequence[Rule], judged: Mapping[str, Sequence[Judged]]) -> list[Row]:
    """What the rules say of the answers of each column; a rule that applies to none is left out."""
    rows = []
    for rule in rules:
        columns = {name: each for name, each in judged.items() if name != WANTED or rule.of_wanted}
        scores = {name: [rule.score(j) for j in each] for name, each in columns.items()}
        weights = {name: [rule.weight(j) for j in each] for name, each in columns.items()}
        row = Row(rule, scores, weights)
        rows += [row] if any(row.figure(name) for name in scores if name != WANTED) else []
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on rows of the report: on how many rules the run is better than its base, and which is the worst; without
    a base, its nearness to what is wanted, and how many rules found fault with some answer."""
    compared = [row for row in rows if "outcome" in row]
    if not compared:
        return _alone(rows)
    better, worse, same = (
        [row for row in compared if row["outcome"] == outcome] for outcome in ("better", "worse", "no clear difference")
    )
    told = f"better than the base on {len(better)} of {len(compared)} rules, worse on {len(worse)}"
    told += f", no clear difference on {len(same)}" if same else ""
    if not worse:
        return told
    worst = min(worse, key=lambda row: (row["p"], row["better_on"] - row["worse_on"]))
    figures = f"{shown(worst, RUN)} beside {shown(worst, BASE)}"
    return f"{told}; worst: {worst['name']} ({figures}, worse on {worst['worse_on']} prompts, better on "\
           f"{worst['better_on']})"


def _alone(rows: Sequence[Mapping[str, Any]]) -> str:
    named = {row["name"]: row for row in rows}
    near = ", ".join(f"{name} {shown(named[name], RUN)}" for name in ("exact match", "chrF") if name in named)
    faults = [row for row in rows if row["better"] == LOWER and row["kind"] == SHARE and row[RUN]["value"] > 0]
    most = max(faults, key=lambda row: row[RUN]["value"], default=None)
    told = f"no base to compare with; {near}"
    return f"{told}; most faults: {most['name']} ({shown(most, RUN)})" if most else told


def shown(row: Mapping[str, Any], column: str, interval: bool = False) -> str:
    """A figure of a row of the report in its unit, with its interval where that is asked for; empty for none."""
    if not (figure := row.get(column)):
        return ""
    scale, unit, digits = {SHARE: (100, " %", 1), LOSS: (1, "", 4), PERPLEXITY: (1, "", 1)}[row["kind"]]
    told = f"{scale * figure['value']:.{digits}f}{unit}"
    if not interval or "low" not in figure:
        return told
    digits = {SHARE: 0, LOSS: 2, PERPLEXITY: 1}[row["kind"]]
    return f"{told} ({scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f})"
