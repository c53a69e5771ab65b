"""What only many records together show: copies, contradictions, leaks into what is held out, too few of a kind."""

from __future__ import annotations

import difflib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from data.instructions.records import Record
from data.linting.near import Signatures
from data.linting.rules import Found, answers, excerpt, whole
from runtime.errors import UsageError

# Fields that say how a record is to sound, or what it is about, and of which a data set should have even shares.
PERSONA_FIELDS = ("tone", "persona", "style", "voice", "register", "mood", "emotion", "character", "category", "topic")
FEW, MANY = 2, 40  # values that such a field has
UNEVEN = 5  # times as many records of the most frequent value as of the rarest

Finding = tuple[str, str, Found]  # rule, where, what


def key(text: str) -> int:
    """64 bits that are equal for texts that are equal but for white space."""
    digest = blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


class Across:
    """Records as they come, a few hundred bytes of each: 512 of its signature, its place and three keys."""

    def __init__(self, near: bool) -> None:
        """near: whether near-duplicates are looked for, which takes most of the time and memory."""
        self.where: list[str] = []
        self.held_out = array("b")
        self.wholes, self.prompts, self.answers = (array("Q") for _ in range(3))
        self.signatures = Signatures() if near else None
        self.signed = array("L")  # which record each signature is of
        self.seen: set[int] = set()

    def add(self, record: Record, held_out: bool) -> None:
        """One record more."""
        text, asked = whole(record), asked_of(record)
        self.where.append(record.where)
        self.held_out.append(held_out)
        self.wholes.append(key(text))
        self.prompts.append(key(asked.casefold()) if asked.strip() else 0)
        self.answers.append(key(answers(record)[-1]))
        if self.signatures and self.wholes[-1] not in self.seen:
            self.signatures.add(text)
            self.signed.append(len(self.where) - 1)
        self.seen.add(self.wholes[-1])

    def findings(self) -> Iterator[Finding]:
        """What the records together break, by rule, where and what."""
        near = self._near()
        yield from self._copies()
        for record, (first, share) in near.items():
            yield "near-duplicate", self.where[record], Found(share, f"{share:.0%} the same as {self.where[first]}")
        yield from self._contradictions()
        yield from self._leaks(near)

    def _near(self) -> dict[int, tuple[int, float]]:
        found = self.signatures.near() if self.signatures else {}
        return {self.signed[i]: (self.signed[first], share) for i, (first, share) in found.items()}

    def _copies(self) -> Iterator[Finding]:
        counts, firsts = Counter(self.wholes), {}
        for i, whole_key in enumerate(self.wholes):
            if (first := firsts.setdefault(whole_key, i)) != i:
                told = f"the same as {self.where[first]}, which is there {counts[whole_key]:,} times"
                yield "duplicate", self.where[i], Found(counts[whole_key], told)

    def _contradictions(self) -> Iterator[Finding]:
        firsts: dict[int, int] = {}
        others: dict[int, set[int]] = {}  # the answers to a prompt, where there are several
        for i, (asked, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if not asked or (first := firsts.setdefault(asked, i)) == i:
                continue
            known = others.setdefault(asked, {self.answers[first]})
            if answer not in known:
                known.add(answer)
                told = f"the prompt of {self.where[first]}, answer number {len(known):,}"
                yield "contradiction", self.where[i], Found(len(known), told)

    def _leaks(self, near: Mapping[int, tuple[int, float]]) -> Iterator[Finding]:
        """Held-out records of which there is a copy, a near one or the prompt in training."""
        trained: dict[int, int] = {}
        for i, held_out in enumerate(self.held_out):
            if not held_out:
                trained.setdefault(self.prompts[i] or self.wholes[i], i)
        like: dict[int, tuple[int, float]] = {}  # a held-out record -> the nearest training record
        for record, (first, share) in near.items():
            if self.held_out[record] != self.held_out[first]:
                inside, outside = (first, record) if self.held_out[first] else (record, first)
                like[inside] = max(like.get(inside, (outside, 0.0)), (outside, share), key=lambda pair: pair[1])
        for i, held_out in enumerate(self.held_out):
            if held_out and (first := trained.get(self.prompts[i] or self.wholes[i])) is not None:
                yield "leak", self.where[i], Found(1.0, f"the prompt of {self.where[first]}, which is trained on")
            elif held_out and i in like:
                first, share = like[i]
                yield (
                    "leak",
                    self.where[i],
                    Found(share, f"{share:.0%} the same as {self.where[first]}, which is trained on"),
                )


def asked_of(record: Record) -> str:
    """All before the last answer, as text."""
    if not record.messages:
        return record.prompt
    return "\n".join(f"{m['content']}\n{m.get('input', '')}" for m in record.messages[:-1])


class Balance:
    """How many records have each value of the fields that say how they are to sound."""

    def __init__(self, field: str = "") -> None:
        """field: the one to count; without it, those of PERSONA_FIELDS that are there."""
        self.asked, self.fields = field, (field,) if field else PERSONA_FIELDS
        self.counts: dict[str, Counter[str]] = {}
        self.firsts: dict[tuple[str, str], str] = {}

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """One row more. Raises UsageError where the first one does not have the field that was asked for."""
        if self.asked and not self.counts and self.asked not in row:
            near = difflib.get_close_matches(self.asked, row, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            there = ", ".join(map(repr, row))
            raise UsageError(f"--persona-field {self.asked}: {where} has no such column; {meant}it has {there}")
        for name in self.fields:
            value = row.get(name)
            if isinstance(value, str) and 0 < len(value) <= 60:
                counts = self.counts.setdefault(name, Counter())
                if len(counts) <= MANY:  # with more, it is a text of the record's own
                    counts[value] += 1
                    self.firsts.setdefault((name, value), where)

    def told(self) -> dict[str, Counter[str]]:
        """The fields that have few values, with the number of records of each."""
        return {name: counts for name, counts in self.counts.items() if FEW <= len(counts) <= MANY}

    def findings(self) -> Iterator[Finding]:
        """The values that are rare beside the most frequent of their field."""
        for name, counts in self.told().items():
            most, many = counts.most_common(1)[0]
            for value, few in counts.items():
                if few * UNEVEN < many:
                    told = f"{name} {excerpt(value)}: {few:,} beside {many:,} of {excerpt(most)}"
                    yield "unbalanced", self.firsts[name, value], Found(many / few, told)
