"""The rules, by name: what each finds. Those that look at one record by itself have a function for that.

A record counts once for a rule, however often it breaks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.instructions.records import Record
from data.linting.private import personal, secrets
from data.linting.tasks import tasks
from data.linting.texts import broken, sentences, split_boilerplate, urls
from runtime.errors import UserError

LONGEST_SENTENCE, LONGEST_ANSWER = 28, 400  # words
NOTHING = re.compile(r"[\s.\-_…]*|\W*(?:n/?a|null|nan|todo|tbd|no ?(?:in|out)put)\W*", re.IGNORECASE)


class Found(NamedTuple):
    """What a rule found in a record: how bad it is, larger being worse, and what it is."""

    badness: float
    what: str


@dataclass(frozen=True)
class Rule:
    """says: what breaks it, in a few words. check: of one record by itself."""

    says: str
    check: Callable[[Record], Found | None] | None = None
    mended: bool = False  # by `dataset.py clean`


def answers(record: Record) -> list[str]:
    """What the model is to say."""
    said = [message["content"] for message in record.messages if message["role"] == "assistant"]
    return said if record.messages else [record.completion]


def prompt(record: Record) -> str:
    """What is asked last, without the input it is about."""
    asked = [message["content"] for message in record.messages if message["role"] == "user"]
    return asked[-1] if record.messages else record.prompt


def whole(record: Record) -> str:
    """All of its text, a part a line."""
    if not record.messages:
        return "\n".join(filter(None, (record.prompt, record.completion)))
    return "\n".join(text for m in record.messages for text in (m["content"], m.get("input", "")) if text)


def excerpt(text: str, longest: int = 90) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * longest].split())
    line = line if len(line) <= longest else line[: longest - 3] + "..."
    return repr(line if line.isprintable() else "".join(char if char.isprintable() else "�" for char in line))


def _several(what: list[str], shown: Callable[[str], str] = excerpt) -> Found | None:
    """What was found several times: the first, and how many more."""
    more = f" and {len(what) - 1} more" if len(what) > 1 else ""
    return Found(len(what), f"{shown(what[0])}{more}") if what else None


# --- one record by itself -------------------------------------------------------------------------------------------


def _empty(record: Record) -> Found | None:
    hollow = [text for text in answers(record) if len(text) < 20 and NOTHING.fullmatch(text)]
    return Found(0, f"the answer is {excerpt(hollow[0])}") if hollow else None


def _broken(record: Record) -> Found | None:
    text = whole(record)
    if (found := broken(text)) is None:
        return None
    at = text.index(found)
    return Found(text.count(found), f"{ascii(found)} in {excerpt(text[max(0, at - 20) : at + 40], 60)}")


def _tasks(record: Record) -> Found | None:
    found = tasks(prompt(record))
    return Found(len(found), f"{len(found)} tasks: {excerpt(prompt(record))}") if len(found) > 1 else None


def _long_answer(record: Record) -> Found | None:
    words = max(len(text.split()) for text in answers(record))
    return Found(words, f"{words:,} words") if words > LONGEST_ANSWER else None


def _long_sentence(record: Record) -> Found | None:
    worst, longest = LONGEST_SENTENCE, ""
    for text in answers(record):
        if len(text) < 2 * worst:  # characters
            continue
        for sentence in sentences(text):
            if (words := len(sentence.split())) > worst:
                worst, longest = words, sentence
    return Found(worst, f"{worst} words: {excerpt(longest)}") if longest else None


def _boilerplate(record: Record) -> Found | None:
    return _several([found for text in answers(record) for found in split_boilerplate(text)[1]])


def _urls(record: Record) -> Found | None:
    return _several([found for text in answers(record) for found in urls(text)])


def _personal(record: Record) -> Found | None:
    return _several(personal(whole(record)), str)


def _secrets(record: Record) -> Found | None:
    return _several(secrets(whole(record)), str)


RULES: Mapping[str, Rule] = {
    "not-a-record": Rule("no row of JSON or CSV, or without the columns of a record"),
    "empty": Rule("an empty answer or instruction, or one that stands for nothing, as N/A", _empty),
    "roles": Rule("an unknown role, turns out of order, or no answer at the end"),
    "unicode": Rule("control characters, replacement characters, or UTF-8 read as another encoding", _broken),
    "several-tasks": Rule("a prompt with more than one question or order", _tasks),
    "long-answer": Rule(f"an answer of more than {LONGEST_ANSWER} words", _long_answer),
    "long-sentence": Rule(f"an answer with a sentence of more than {LONGEST_SENTENCE} words", _long_sentence),
    "boilerplate": Rule('"As an AI ...", disclaimers, pleasantries', _boilerplate, mended=True),
    "url": Rule("an answer with a URL, which a model learns to invent", _urls, mended=True),
    "personal": Rule("e-mail addresses, telephone and card numbers", _personal),
    "secret": Rule("keys and tokens, which are to be withdrawn too", _secrets),
    "context": Rule("more tokens than the context has"),
    "unwritable": Rule("what the base's template or tokenizer refuses: special tokens, unknown characters"),
    "duplicate": Rule("the same as an earlier record, white space aside", mended=True),
    "near-duplicate": Rule("nearly the same as an earlier record"),
    "contradiction": Rule("the prompt of an earlier record with another answer"),
    "leak": Rule("held out, and the training records have its prompt or nearly all of its text"),
    "unbalanced": Rule("a tone or persona with few records beside the others"),
}
# Why a row is no record, by what `to_record` says of it.
REASONS = (
    (re.compile(r"\bis empty$|must be text, and it is null$"), "empty"),
    (re.compile(r"has the role|'s turn is$|the last message must be"), "roles"),
    (re.compile(r"lone surrogate|codec can't decode|not UTF-8"), "unicode"),
)


def rule_of(error: UserError) -> str:
    """The rule that a row breaks which is no record."""
    return next((rule for pattern, rule in REASONS if pattern.search(str(error))), "not-a-record")


def check(record: Record, names: Container[str]) -> Iterator[tuple[str, Found]]:
    """Which of these rules a record breaks by itself."""
    for name, rule in RULES.items():
        if rule.check and name in names and (found := rule.check(record)):
            yield name, found
