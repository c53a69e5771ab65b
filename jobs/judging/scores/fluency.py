"""Whether an answer runs in circles, and whether it shows what the template wraps answers in."""

from __future__ import annotations

import re
from typing import NamedTuple

from data.chat import Template
from jobs.judging.scores.words import words
from runtime.errors import UserError

N = 4  # words in a row
# What templates put around turns, whichever a model was trained on; a base that goes on with a chat writes the last.
MARKS = re.compile(
    r"#{2,3} ?(?:Instruction|Input|Response|Human|Assistant|User)\b:?|<\|[a-z_]+\|>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|</?(?:start|end)_of_turn>|^(?:User|Human|Assistant|System|Instruction|Response) ?:",
    re.MULTILINE,
)
SAID = "\ue000"  # stands in a template for what people and models say; no template writes it


class Scaffolding(NamedTuple):
    """What a template writes around what is said: whole lines, and beginnings of lines. Special tokens are not in it,
    as an answer's text has none."""

    lines: frozenset[str]
    starts: tuple[str, ...]

    @classmethod
    def of(cls, template: Template) -> Scaffolding:
        """That of a template; none of one that refuses a plain chat."""
        text = MARKS.sub("", "\n".join(_written(template, extra) for extra in ({}, {"input": SAID})))
        for token in sorted((text for _, text in template.special if text), key=len, reverse=True):
            text = text.replace(token, "")
        parts = [(line.partition(SAID)[0].strip(), SAID in line) for line in text.split("\n")]
        lines = frozenset(line for line, said in parts if line and not said)
        return cls(lines, tuple(dict.fromkeys(start for start, said in parts if len(start) > 1 and said)))


def _written(template: Template, extra: dict[str, str]) -> str:
    try:
        return template.write([{"role": "user", "content": SAID} | extra, {"role": "assistant", "content": SAID}])
    except UserError:
        return ""


def repetition(answer: str) -> float:
    """The share of an answer's runs of four words that were there before: seq-rep-4 of Welleck et al. 2020, arXiv
    1908.04319. 0 for an answer with fewer words."""
    found = words(answer)
    runs = [tuple(found[i : i + N]) for i in range(len(found) - N + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def leaked(answer: str, wanted: str, own: Scaffolding) -> str | None:
    """The first piece of a template in an answer, or None: a mark that templates use, or scaffolding of its own. What
    the wanted answer has too is none."""
    found = [match[0].strip() for match in MARKS.finditer(answer)]
    for line in map(str.strip, answer.split("\n")):
        found += [line] if line in own.lines else [start for start in own.starts if line.startswith(start)]
    return next((piece for piece in found if piece not in wanted), None)
