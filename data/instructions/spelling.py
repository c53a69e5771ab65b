"""Words as they are spelled: which spellings may be of one word, and how well a line is spelled beside another."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

LETTERS = r"[^\W\d_]+"
WORD = re.compile(rf"'{LETTERS}|{LETTERS}(?:['’]{LETTERS})*|&")  # 'tis, heav'n, and the printers' sign for "and"
ONE_LETTER = str.maketrans("vjy", "uii")  # the Folio's printers put either where modern spelling has one


def words_in(line: str) -> list[str]:
    """The words of a line as they are spelled, capitals and apostrophes included; a hyphen parts words."""
    return WORD.findall(line)


@functools.cache
def key(word: str) -> str:
    """What is equal for most spellings of one word: its first letter, and its consonants, each once in a row."""
    first, rest = (letters := _old_letters(word))[:1], letters[1:]
    return first + _single(re.sub("[aeiou]", "", rest))


def folded(line: str) -> str:
    """A line as small letters and nothing else, with u for v, i for j and y, and no letter twice in a row."""
    return _single(_old_letters(line))


def _old_letters(text: str) -> str:
    spelled_out = text.lower().replace("æ", "ae").replace("&", "and")
    return re.sub("[^a-z]", "", spelled_out).replace("vv", "w").translate(ONE_LETTER)


def _single(letters: str) -> str:
    return re.sub(r"(.)\1+", r"\1", letters)


class SpellingScore(NamedTuple):
    """words: the share of words that are right, 0 to 1. lines: the share of lines that are, to the last sign."""

    words: float
    lines: float


def score(answers: Sequence[str], references: Sequence[str]) -> SpellingScore:
    """How well answers of any length are spelled, each beside the line that it should be.

    A word is right where it is the reference's, capitals and apostrophes included, in its order: `difflib` matches the
    words of both lines. The right words of all lines are divided by the words of the references or, of a line whose
    answer has more words, by the answer's, so that neither stopping early nor running on pays. Signs between words
    count for whole lines alone, and blanks around a line nowhere. Raises ValueError where there is no word at all.
    """
    right = total = 0
    for answer, reference in zip(answers, references, strict=True):
        said, wanted = words_in(answer), words_in(reference)
        blocks = difflib.SequenceMatcher(None, said, wanted, autojunk=False).get_matching_blocks()
        right += sum(block.size for block in blocks)
        total += max(len(said), len(wanted))
    if not total:
        raise ValueError("there are no words to score")
    exact = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return SpellingScore(right / total, exact / len(references))
