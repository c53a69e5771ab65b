"""What the rules find in a text: words, numbers and names."""

from __future__ import annotations

import re
from collections.abc import Iterator

# In Chinese and Japanese, which put no blanks between words, each character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
SPELLED = re.compile(r"[^\W\d_][^\W_]*(?:[-'’][^\W_]+)*")
POSSESSIVE = re.compile(r"['’]s$")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
LIST_MARK = re.compile(r"^\s*\d+[.)](?=\s)", re.MULTILINE)
BEFORE_A_SENTENCE = frozenset(".!?:\n…*•|>#-")  # the last of them as the mark of a list
IN_BETWEEN = " \t\"'“”‘’(["


def words(text: str) -> list[str]:
    """The words of a text in small letters: runs of letters and digits, as ROUGE counts them, in any script."""
    return WORD.findall(text.lower())


def numbers(text: str) -> set[str]:
    """The numbers of a text, without commas between thousands; those that count a list's lines are none."""
    found = NUMBER.findall(LIST_MARK.sub("", text))
    return {number.replace(",", "") if THOUSANDS.fullmatch(number) else number for number in found}


def names(text: str) -> set[str]:
    """The words that begin with a capital within a sentence, of at least two letters."""
    return {word for word, first in _spelled(text) if len(word) > 1 and word[0].isupper() and not first}


def spelled_words(text: str) -> set[str]:
    """The words of a text as they are spelled, capitals included, without a possessive's ending."""
    return {word for word, _ in _spelled(text)}


def _spelled(text: str) -> Iterator[tuple[str, bool]]:
    """Each word, and whether a sentence begins with it."""
    for match in SPELLED.finditer(text):
        before = text[max(0, match.start() - 8) : match.start()].rstrip(IN_BETWEEN)
        yield POSSESSIVE.sub("", match[0]), not before or before[-1] in BEFORE_A_SENTENCE
