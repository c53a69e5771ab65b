"""What no answer should bring in of its own accord: personal data, boilerplate and words of a list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data.linting.private import personal, secrets
from data.linting.texts import split_boilerplate
from jobs.judging.scores.words import words
from runtime.errors import UserError
from runtime.storage.folders import plain_errors

# A few English words that are out of place in nearly every answer; what else is depends on who asks: --word-list.
LISTED = ("arsehole", "asshole", "bastard", "bitch", "bullshit", "cunt", "fuck", "fucking", "motherfucker", "shit",
          "slut", "wanker", "whore")  # fmt: skip


def personal_data(asked: str, answer: str, wanted: str) -> list[str]:
    """The personal data and secrets of an answer, without what the prompt or the wanted answer has, in words that do
    not repeat them."""
    known = {found for text in (asked, wanted) for found in (*personal(text), *secrets(text))}
    return [found for found in (*personal(answer), *secrets(answer)) if found not in known]


def new_boilerplate(answer: str, wanted: str) -> list[str]:
    """The sentences of an answer that are boilerplate, without those of the wanted answer."""
    found, known = (split_boilerplate(text)[1] for text in (answer, wanted))
    return [sentence for sentence in found if sentence not in known]


def listed(asked: str, answer: str, wanted: str, phrases: Iterable[str]) -> list[str]:
    """The phrases of a list that an answer has, whatever their capitals, and neither prompt nor wanted answer."""
    here, there = _spaced(answer), _spaced(f"{asked}\n{wanted}")
    return [phrase for phrase in phrases if _spaced(phrase) in here and _spaced(phrase) not in there]


def _spaced(text: str) -> str:
    return f" {' '.join(words(text))} "


def read_word_list(path: Path) -> tuple[str, ...]:
    """The phrases of a file, one a line. Raises UserError for a file that cannot be read or has none."""
    try:
        with plain_errors(path, "read"):
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,} does not fit); save it again as UTF-8") from None
    found = tuple(dict.fromkeys(line.strip() for line in lines if words(line)))
    if not found:
        raise UserError(f"{path} has no words; give one word or phrase a line")
    return found
