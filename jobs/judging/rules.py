"""The rules by which answers are judged: what each looks at, how that is measured, and which figure is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.instructions.spelling import score as spelling_score
from data.instructions.spelling import words_in
from jobs.judging.scores import faithfulness, safety
from jobs.judging.scores.copying import N as COPIED
from jobs.judging.scores.fluency import N as REPEATED
from jobs.judging.scores.fluency import Scaffolding, leaked, repetition
from jobs.judging.scores.lengths import BANDS, band, within
from jobs.judging.scores.words import words

HIGHER, LOWER, NEITHER = "higher", "lower", ""
SHARE, LOSS, PERPLEXITY = "share", "loss", "perplexity"  # kinds of figures; the first from 0 to 1
# Rules that are looked at by name.
WANTED_LOSS, TRAINING_LOSS = "loss of wanted answers", "loss on training records"
EXACT, CHRF, BY_HEART = "exact match", "chrF", "answered by heart"


@dataclass(frozen=True)
class Judged:
    """An answer with all that rules look at. asked: the prompt. wanted: the answer of the data. ended: whether the
    model came to an end within its tokens. loss: in nats a token under the base, given the prompt. overlap: with the
    training output that is most like it, from 0 to 1. verbatim: whether it has the words of a training output."""

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
        Rule(group, "perplexity", "exp of the loss a token under the base, given the prompt; loops and the base's own "
             "answers are low, gibberish is high, so neither is better", NEITHER, PERPLEXITY, lambda j: j.loss),
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
        rule(EXACT, "the wanted answer to the last sign, but for white space around it", HIGHER,
             lambda j: faithfulness.exact(j.text, j.wanted)),
        rule("words right", "words spelled as in the wanted answer and in its order, of the words of the longer one",
             HIGHER, lambda j: spelling_score([j.text], [j.wanted]).words if _spelled(j) else None, weight=_spelled),
        rule("ROUGE-L", "F1 of the longest common sequence of words, by rouge_score", HIGHER,
             lambda j: faithfulness.rouge_l(j.text, j.wanted)),
        rule(CHRF, "chrF2 of runs of 1 to 6 characters, by sacrebleu; 100 % is the same text", HIGHER,
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


def _by_heart(judged: Judged) -> float | None:
    if judged.verbatim is None:
        return None
    return float(judged.verbatim and words(judged.text) != words(judged.wanted))


def _copying() -> list[Rule]:
    group = "Copying"
    return [
        Rule(group, BY_HEART, "answers that are a training output word for word where another was wanted",
             LOWER, score=_by_heart, of_wanted=False),
        Rule(group, "overlap", f"runs of {COPIED} words (or all of fewer) found in one training output; compare it "
             "with that of the wanted answers", score=lambda j: j.overlap),
    ]  # fmt: skip
