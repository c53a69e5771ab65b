"""How near an answer is to the one that is wanted, and whether it keeps what it was given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set

from jobs.judging.scores.words import names, numbers, spelled_words, words
from runtime.extras import needs_package

EXTRA = "instructions"


class _Words:
    """Our words in the place of rouge_score's, which knows the letters of English alone; in English both are equal."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge() -> Callable[[str, str], float]:
    with needs_package("rouge_score", EXTRA):
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, wanted: scorer.score(wanted, answer)["rougeL"].fmeasure


@functools.cache
def _chrf() -> Callable[[str, str], float]:
    with needs_package("sacrebleu", EXTRA):
        from sacrebleu.metrics import CHRF
    metric = CHRF()
    return lambda answer, wanted: metric.sentence_score(answer, [wanted]).score / 100


def check_packages() -> None:
    """Raises UserError, with the line that installs it, where a library of these scores is missing."""
    _rouge(), _chrf()


def exact(answer: str, wanted: str) -> float:
    """1 where the answer is the wanted one to the last sign, but for white space around it."""
    return float(answer.strip() == wanted.strip())


def rouge_l(answer: str, wanted: str) -> float:
    """ROUGE-L's F1 by rouge_score: the longest sequence of words that both have in this order. Lin 2004."""
    return _rouge()(answer, wanted)


def chrf(answer: str, wanted: str) -> float:
    """chrF2 by sacrebleu: runs of one to six characters that both have. Popović 2015."""
    return _chrf()(answer, wanted)


def _kept(expected: Set[str], there: Set[str]) -> float | None:
    return len(expected & there) / len(expected) if expected else None


def numbers_kept(asked: str, answer: str, wanted: str) -> float | None:
    """Of the numbers that the prompt and the wanted answer share, the share that the answer has; None for none."""
    return _kept(numbers(asked) & numbers(wanted), numbers(answer))


def names_kept(asked: str, answer: str, wanted: str) -> float | None:
    """The same of names: words with a capital within a sentence of the prompt."""
    return _kept(names(asked) & spelled_words(wanted), spelled_words(answer))


def numbers_made_up(asked: str, answer: str, wanted: str) -> float:
    """1 where the answer has a number that neither the prompt nor the wanted answer has."""
    return float(bool(numbers(answer) - numbers(asked) - numbers(wanted)))
