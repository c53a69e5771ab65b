"""One record to learn from, and which columns of a file make it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.chat import ROLES, Message
from runtime.errors import UserError

# The forms that a record may have, by the columns it needs; the first that is there counts.
FORMS = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = ("input", "system")  # of a record with an instruction
# What well-known data sets call the same: ShareGPT, Dolly and Alpaca's heirs.
ALSO = {
    "messages": ("conversations",),
    "input": ("context",),
    "output": ("response",),
}
COLUMNS = tuple(dict.fromkeys((*(name for form in FORMS.values() for name in form), *OPTIONAL)))
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Record:
    """A chat whose assistant turns are learned; or, where it has no messages, a text that is learned after a prompt,
    which may be empty.

    messages: the user's may have an `input` beside their content. where: the file and line it came from. row: all that
    the file says of it, by its own names.
    """

    where: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def answer(self) -> str:
        """The last text that is learned."""
        return self.messages[-1]["content"] if self.messages else self.completion

    @property
    def asked(self) -> str:
        """All before it, as one text that is equal where the prompts are."""
        return json.dumps([dict(m) for m in self.messages[:-1]], sort_keys=True) if self.messages else self.prompt

    def fraction(self) -> float:
        """A number from 0 to 1 that only what is asked decides, for a choice that other records do not change; of a
        text without a prompt, the text decides."""
        text = self.asked or self.completion
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def parse_columns(text: str) -> dict[str, str]:
    """COLUMNS, as `instruction=question,output=answer`: our name of a column -> the file's. Raises ValueError."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not equals or not theirs:
            raise ValueError(f"{part!r} is not like instruction=question")
        if ours not in COLUMNS:
            raise ValueError(f"{ours!r} is none of {', '.join(COLUMNS)}")
        if ours in found:
            raise ValueError(f"{ours} is given twice")
        found[ours] = theirs
    return found


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row by our names of its columns."""
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise UserError(f"{where}: there is no column {missing[0]!r}, which COLUMNS names; {_there(row)}")
    found = {name: row[name] for name in COLUMNS if name in row and name not in columns.values()}
    found |= {ours: row[theirs] for ours, theirs in columns.items()}
    for ours, others in ALSO.items():
        if ours not in found and (there := next((name for name in others if name in row), None)):
            found[ours] = row[there]
    return found


def _there(row: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(repr, row)) or 'none'}"


def to_record(row: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Record:
    """A row of a file as a record. columns: from `parse_columns`.

    Raises UserError that names the column, and the one that may have been meant, for a row that is none.
    """
    found = _renamed(row, columns, where)
    form = next((form for form, needed in FORMS.items() if all(name in found for name in needed)), None)
    if form is None:
        raise UserError(f"{where}: {_what_is_missing(row, found)}")
    if form == "messages":
        return Record(where, _messages(found["messages"], where), row=row)
    if form == "completion" and isinstance(found["prompt"], list):
        parts = [*found["prompt"], *found["completion"]] if isinstance(found["completion"], list) else None
        return Record(where, _messages(parts, where), row=row)
    texts = {name: _text(found[name], name, where) for name in FORMS[form]}
    if form == "completion":
        return Record(where, prompt=texts["prompt"], completion=_filled(texts, "completion", where), row=row)
    if form == "text":
        return Record(where, completion=_filled(texts, "text", where), row=row)
    others = {name: _text(found.get(name) or "", name, where) for name in OPTIONAL}
    _filled(texts, "output", where), _filled(texts, "instruction", where)
    system = [{"role": "system", "content": others["system"]}] if others["system"].strip() else []
    return Record(where, (*system, *asking(texts["instruction"], others["input"]), _said(texts["output"])), row=row)


def asking(instruction: str, input: str = "") -> list[Message]:
    """The messages of an instruction with an input, which may be empty."""
    return [{"role": "user", "content": instruction} | ({"input": input} if input.strip() else {})]


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _what_is_missing(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What a row would need, with the near miss where there is one."""
    started = [needed for needed in FORMS.values() if any(name in found for name in needed)]
    missing = [name for name in (started or [FORMS["instruction"]])[0] if name not in found]
    for name in missing:
        if near := difflib.get_close_matches(name, [key for key in row if key not in found], n=1, cutoff=0.7):
            return f"there is no column {name!r}; did {near[0]!r} mean it? Then set COLUMNS={name}={near[0]}"
    forms = "; ".join(", ".join(needed) for needed in FORMS.values())
    return f"there is no column {missing[0]!r}; {_there(row)}, and a record has one of: {forms} (see COLUMNS)"


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, and it is {json.dumps(value, default=str)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} has half of a character (a lone surrogate) at {error.start:,}") from None
    return value


def _filled(texts: Mapping[str, str], name: str, where: str) -> str:
    if not texts[name].strip():
        raise UserError(f"{where}: {name} is empty")
    return texts[name]


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """A chat that ends with an answer. Raises UserError that names the message for anything else."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages must be a list of messages")
    found = [_message(each, f"{where}: message {i}") for i, each in enumerate(value, 1)]
    turns = found[1:] if found[0]["role"] == "system" else found
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            place = i + 1 + len(found) - len(turns)
            raise UserError(f"{where}: message {place} is of the {message['role']}, where the {expected}'s turn is")
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message must be the assistant's, which is what is learned")
    return tuple(found)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f'{where} must be like {{"role": "user", "content": "..."}}')
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}; there are {', '.join(ROLES)}")
    text = _text(content, "content", where)
    if not text.strip() and role != "system":
        raise UserError(f"{where}: content is empty")
    return {"role": role, "content": text}


def told(records: Sequence[Record]) -> str:
    """How many records, in words."""
    return f"{len(records):,} record{'' if len(records) == 1 else 's'}"
