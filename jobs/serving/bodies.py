"""The bodies of requests: which fields there are, and what they may be. Whatever would not be heeded is refused."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.chat import Message
from jobs.generating.prompts import messages_of
from runtime.errors import UserError

MOST_STOPS, LONGEST_STOP, MOST_CHOICES, MOST_PROMPTS = 4, 200, 16, 64


class RefusedError(Exception):
    """A request that gets an error of OpenAI's protocol for an answer. param: the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Field:
    """What a field may be, and in words what it must be."""

    holds: Callable[[Any], bool]
    must: str


def whole(low: int, high: int) -> Field:
    """A whole number within bounds."""
    return Field(lambda v: type(v) is int and low <= v <= high, f"must be a whole number from {low} to {high}")


def number(low: float, high: float, without_low: bool = False) -> Field:
    """A number within bounds."""
    told = (
        f"must be a number {'above' if without_low else 'from'} {low:g}{', at most' if without_low else ' to'} {high:g}"
    )
    return Field(lambda v: type(v) in (int, float) and low <= v <= high and not (without_low and v == low), told)


def only(*values: Any) -> Field:
    """A field of the protocol that has no effect here: values that ask for none."""
    shown = " or ".join(json.dumps(value) for value in values)
    return Field(lambda v: any(type(v) is type(value) and v == value for value in values),
                 f"is not supported here; leave it out{f', or set it to {shown}' if values else ''}")  # fmt: skip


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= MOST_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts)
    )


def _is_prompt(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and 0 < len(texts) <= MOST_PROMPTS and all(isinstance(text, str) for text in texts)


def _are_strengths(value: Any) -> bool:
    return isinstance(value, dict) and all(type(s) in (int, float) and math.isfinite(s) for s in value.values())


TRUTH = Field(lambda v: type(v) is bool, "must be true or false")
ANYTHING = Field(lambda v: True, "")
FIELDS = {
    "model": Field(lambda v: isinstance(v, str), "must be text, the name of a model"),
    "temperature": number(0, 100),
    "top_p": number(0, 1, without_low=True),
    "top_k": whole(1, 2**31 - 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 100, without_low=True),
    "n": whole(1, MOST_CHOICES),
    "seed": whole(0, 2**31 - 1),
    "stop": Field(_is_stop, f"must be text or a list of at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"),
    "stream": TRUTH,
    "stream_options": Field(
        lambda v: isinstance(v, dict) and v.keys() <= {"include_usage"} and all(type(x) is bool for x in v.values()),
        'must be {"include_usage": true} or {"include_usage": false}',
    ),
    "adapters": Field(_are_strengths, 'must be the strengths of adapters by name, as {"lora-folio-r8": 0.5}'),
    "frequency_penalty": only(0, 0.0),
    "presence_penalty": only(0, 0.0),
    "logit_bias": only({}),
    "user": ANYTHING,
    "metadata": ANYTHING,
    "store": only(False),
}
COMPLETION = FIELDS | {
    "prompt": Field(_is_prompt, f"must be text, or a list of at most {MOST_PROMPTS} texts"),
    "echo": only(False),
    "suffix": only(),
    "best_of": only(1),
    "logprobs": only(),
}
CHAT = FIELDS | {
    "messages": ANYTHING,  # `messages_of` says what they must be
    "logprobs": only(False),
    "top_logprobs": only(),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "tool_choice": only("none"),
    "parallel_tool_calls": ANYTHING,
}


def read_body(data: bytes, fields: Mapping[str, Field], longest: int) -> dict[str, Any]:
    """The fields of a body that are given, checked. longest: tokens that a text may have at most.

    Raises RefusedError for what is no JSON object, and for a field that is not known or not as it must be.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    tokens = ("max_tokens", "max_completion_tokens") if "messages" in fields else ("max_tokens",)
    known = dict.fromkeys(tokens, whole(1, longest)) | dict(fields)
    for name, value in body.items():
        if name not in known:
            raise RefusedError(400, f"{name[:100]!r} is not a field here; there are {', '.join(known)}", name[:100])
        if not known[name].holds(value):
            raise RefusedError(400, f"{name} {known[name].must}", name)
    for name in ("model", "messages" if "messages" in fields else "prompt"):
        if name not in body:
            raise RefusedError(400, f"{name} is missing", name)
    if len(given := [name for name in tokens if name in body]) > 1:
        raise RefusedError(400, f"{given[0]} and {given[1]} are both there; give one", given[1])
    return {"seed": secrets.randbelow(2**31)} | body


def messages_in(body: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a chat, each with a role and a text. Raises RefusedError for others."""
    messages = body["messages"]
    if isinstance(messages, list):
        messages = [_as_text(message) for message in messages]
    try:
        return messages_of(messages, "the body")
    except UserError as error:
        raise RefusedError(400, str(error).removeprefix("the body: "), "messages") from None


def _as_text(message: Any) -> Any:
    """A message whose content is a list of texts with one text in its place."""
    content = message.get("content") if isinstance(message, dict) else None
    if not (isinstance(content, list) and content):
        return message
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return message | {"content": "".join(texts)} if whole else message
