"""The forms that a record may have in a file, and one from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.chat import GUIDE, Message, Template
from data.instructions.records import ALSO, COLUMNS, FORMS, OPTIONAL, SHAREGPT, Record
from runtime.errors import UserError
from runtime.extras import needs_package

TARGETS = ("instruction", "completion", "messages", "sharegpt", "text")
OURS = {*COLUMNS, *(name for others in ALSO.values() for name in others)}
SPEAKERS = {ours: theirs for theirs, ours in SHAREGPT.items()}


def columns_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """The columns that make a record of a row: our name -> the file's. columns: from `parse_columns`."""
    found = {name: name for name in COLUMNS if name in row and name not in columns.values()} | dict(columns)
    for ours, others in ALSO.items():
        if ours not in found and (there := next((name for name in others if name in row), None)):
            found[ours] = there
    form = next(form for form, needed in FORMS.items() if all(name in found for name in needed))
    used = (*FORMS[form], *(OPTIONAL if form == "instruction" else ()))
    return {ours: found[ours] for ours in used if ours in found}


def others(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """What a row has beside the record, as its tone, and what no form would take for a part of one."""
    used = columns_of(row, columns).values()
    return {name: value for name, value in row.items() if name not in used and name not in OURS}


def converted(record: Record, target: str) -> dict[str, Any]:
    """A record as a row of another form, which is one of TARGETS. As text, a chat is written by `GUIDE`.

    Raises UserError, which names the record, where that form has no place for all of it.
    """
    try:
        return CONVERTERS[target](record)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None


def _content(message: Message) -> str:
    """What a message says, with its input below it, as templates without a place for that write it."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def _chat(record: Record) -> list[dict[str, str]]:
    """A record as messages without inputs."""
    if record.messages:
        return [{"role": message["role"], "content": _content(message)} for message in record.messages]
    if not record.prompt.strip():
        raise UserError("it has no prompt, and a chat begins with one")
    return [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion}]


def _single(record: Record) -> tuple[str, Message, str]:
    """The system prompt, which may be empty, the user's message and the answer of a chat of one turn."""
    messages: list[Message] = list(record.messages or _chat(record))
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if len(messages) != 2:
        raise UserError(
            f"it has {len(messages) // 2} turns, and this form holds one; messages and sharegpt hold several"
        )
    return system, messages[0], messages[1]["content"]


def _as_instruction(record: Record) -> dict[str, Any]:
    system, asked, answer = _single(record)
    row = {"instruction": asked["content"], "input": asked.get("input", ""), "output": answer}
    return row | ({"system": system} if system else {})


def _as_completion(record: Record) -> dict[str, Any]:
    if not record.messages:
        return {"prompt": record.prompt, "completion": record.completion}
    system, asked, answer = _single(record)
    if system.strip():
        raise UserError("it has a system prompt, for which this form has no place; messages and instruction have one")
    return {"prompt": _content(asked), "completion": answer}


def _as_messages(record: Record) -> dict[str, Any]:
    return {"messages": _chat(record)}


def _as_sharegpt(record: Record) -> dict[str, Any]:
    return {"conversations": [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in _chat(record)]}


def _as_text(record: Record) -> dict[str, Any]:
    if not record.messages:
        return {"text": record.prompt + record.completion}
    with needs_package("jinja2", "pretrained"):
        return {"text": Template(GUIDE, ()).write(record.messages).strip()}  # what ends it, training adds


CONVERTERS: Mapping[str, Callable[[Record], dict[str, Any]]] = dict(
    zip(TARGETS, (_as_instruction, _as_completion, _as_messages, _as_sharegpt, _as_text), strict=True)
)
