"""How many tasks a prompt sets: one record should teach one thing. By its words alone, so a guess."""

from __future__ import annotations

import re

from data.linting.texts import sentences

LONGEST = 120  # words: in a longer prompt most sentences are the material that the task is about
VERBS = {
    "analyze", "analyse", "answer", "arrange", "calculate", "categorize", "choose", "classify", "compare",
    "compose", "compute", "convert", "correct", "count", "create", "define", "describe", "design", "determine",
    "develop", "discuss", "draft", "edit", "estimate", "evaluate", "explain", "extract", "find", "generate", "give",
    "identify", "list", "name", "outline", "paraphrase", "plan", "predict", "proofread", "propose", "provide",
    "rank", "recommend", "rewrite", "rephrase", "simplify", "solve", "sort", "suggest", "summarize", "summarise",
    "tell", "translate", "write",
}  # fmt: skip
ADDED = VERBS - {"give", "provide", "answer"}  # which after an "and" tell how to do the first
LEAD = re.compile(
    r"^(?:\W|\d+[.)]|(?:then|next|also|and|finally|lastly|first|second|third|please|now|after that)\b)+", re.IGNORECASE
)
# A second task in the same sentence, as in "summarize the text and translate it": words stand between the verbs.
JOINED = re.compile(r"\w+ \w+(?:[,;]? and(?: then| also)?|[,;] then) (?:please )?([a-z]+)\b", re.IGNORECASE)


def tasks(prompt: str) -> list[str]:
    """The questions and orders in a prompt."""
    if len(prompt.split()) > LONGEST:
        return []
    found = []
    for sentence in sentences(prompt):
        first, _, rest = LEAD.sub("", sentence).partition(" ")
        order = first.lower().strip(",.:;!") in VERBS and bool(rest)
        if order or sentence.endswith("?"):
            found.append(sentence)
        if order:
            found += [match[0] for match in JOINED.finditer(sentence) if match[1].lower() in ADDED]
    return found
